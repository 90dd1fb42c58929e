"""Vision attention over many small pictures at once.

A frame is a picture, and transformers' attention of Qwen's vision towers calls its kernel once for
each picture: a hundred small calls for one clip. Pictures of one size can share one call; the
numbers are the same.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

ATTENTIONS: dict[type[nn.Module], ModuleType] = {
    modeling_qwen3_vl.Qwen3VLVisionAttention: modeling_qwen3_vl,
    modeling_qwen3_vl_moe.Qwen3VLMoeVisionAttention: modeling_qwen3_vl_moe,
    modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention: modeling_qwen2_5_vl,
    modeling_qwen3_5.Qwen3_5VisionAttention: modeling_qwen3_5,
    modeling_qwen3_5_moe.Qwen3_5MoeVisionAttention: modeling_qwen3_5_moe,
}
"""Vision attention of each family, and the module with its rotary function."""


def attend_together(model: nn.Module) -> int:
    """Let the vision attention of a model run once for each size of picture; returns layers."""
    count = 0
    for module in model.modules():
        home = ATTENTIONS.get(type(module))
        if home is not None:
            rotate = home.apply_rotary_pos_emb_vision
            module.forward = partial(_attend_by_size, module, rotate)  # type: ignore[method-assign]
            count += 1
    return count


def _attend_by_size(
    module: Any,
    rotate: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: object,
) -> Tensor:
    """[L D] to [L D]; pictures end at `cu_seqlens`."""
    count = hidden_states.shape[0]
    qkv = module.qkv(hidden_states).reshape(count, 3, module.num_heads, -1).permute(1, 0, 2, 3)
    query, key, value = qkv.unbind(0)
    assert position_embeddings is not None
    query, key = rotate(query, key, *position_embeddings)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    out = torch.empty_like(value)
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        rows = starts[:, None] + torch.arange(length, device=starts.device)
        q, k, v = (one[rows].transpose(1, 2) for one in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=module.scaling)
        out = out.index_copy(0, rows.flatten(), mixed.transpose(1, 2).flatten(0, 1))
    return module.proj(out.reshape(count, -1))
