"""Which attention kernel a judge runs on: asked for by name, checked, never replaced by another.

Axes: B rows, H heads, G heads of keys and values, Q queries, L keys, D head size.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "xformers")
PACKAGES = {"flash_attention_2": ("flash_attn", "flash-attn"), "xformers": ("xformers", "xformers")}
"""Name to the module that an attention needs and the package that brings it."""


def prepare_attention(attention: str, device: str, dtype: str) -> None:
    """Refuse what cannot run here, before anything is loaded; transformers would replace some.

    Args:
        attention: one of `ATTENTIONS`.
        device: where the judge runs.
        dtype: of its weights.

    Raises:
        ValueError: There is no such attention, or it runs on no such device or dtype.
        ImportError: Its package is missing, or its kernels do not load here.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {attention!r}")
    if attention not in PACKAGES:
        return
    module, package = PACKAGES[attention]
    # transformers would take a kernel from the hub in the place of a missing flash_attn.
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"attention {attention!r} needs {package}; install it with: pip install {package}, "
            "or take attention='sdpa'"
        )
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"attention must be 'sdpa' or 'eager' on the device {device!r}, got {attention!r}; "
            "its kernels are for CUDA"
        )
    if attention == "flash_attention_2" and dtype == "float32":
        raise ValueError(
            "dtype must be 'bfloat16' or 'float16' for attention 'flash_attention_2', got "
            "'float32'; its kernels know no float32"
        )
    if attention == "xformers":
        register_xformers()


def check_attention(model: Any, attention: str) -> None:
    """Make sure that every part of a loaded model runs on the attention that was asked for.

    Raises:
        RuntimeError: If one does not.
    """
    for name, part in (("model", model), *model.named_modules()):
        config = getattr(part, "config", None)
        used = getattr(config, "_attn_implementation", attention)
        if used != attention:
            raise RuntimeError(
                f"attention {attention!r} was asked for, but {name} runs on {used!r} with this "
                "version of transformers; ask for that one"
            )


def register_xformers() -> None:
    """Make transformers know the attention 'xformers'.

    Raises:
        ImportError: If the kernels do not load beside the installed torch.
    """
    try:
        importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"attention 'xformers' needs kernels that load with torch {torch.__version__}, got: "
            f"{error}; install the xformers built for it, or take attention='sdpa'"
        ) from error
    ALL_ATTENTION_FUNCTIONS.register("xformers", xformers_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("xformers", sdpa_mask)


def xformers_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """xformers' memory-efficient attention, called as transformers calls its own.

    Args:
        module: the layer; `is_causal` says whether queries see only what came before.
        query: [B H Q D].
        key, value: [B G L D]; H is a multiple of G.
        attention_mask: [B 1 Q L] true where a query sees a key, or None.
        scaling: of the logits; None is D ** -0.5.
        options: `dropout` must be 0; `is_causal` overrides the layer's.

    Returns:
        [B Q H D] and None.
    """
    operators = importlib.import_module("xformers.ops")
    if options.get("dropout"):
        raise ValueError(f"dropout must be 0 with attention 'xformers', got {options['dropout']}")
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (key, value))
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias: Any = None
    if attention_mask is not None:
        # The kernels want rows that begin at multiples of 8 elements. A finite minimum, since a
        # query that sees nothing (padding) would be NaN with minus infinity.
        padded = torch.zeros(
            *(query.shape[0], 1, queries, -(-keys // 8) * 8), dtype=query.dtype, device=query.device
        )
        bias = padded[..., :keys]
        bias.masked_fill_(~attention_mask[..., :keys], torch.finfo(query.dtype).min)
        bias = bias.expand(-1, heads, -1, -1)
    elif is_causal and queries > 1:
        bias = operators.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    shown = [one.transpose(1, 2) for one in (query, key, value)]
    return operators.memory_efficient_attention(*shown, attn_bias=bias, scale=scaling), None
