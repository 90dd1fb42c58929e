"""How much memory a run needs, counted on torch's "meta" device: real shapes, no numbers.

The very code of rollout and update runs there in seconds on any machine; every tensor that it
makes is counted while it lives. What is not counted: the allocator's own waste, workspaces of
kernels, and the CUDA context (about half a gigabyte).

Axes: B videos, latents [B C T H W].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.lora import trained_parameters
from diffusion_rl.rollout import RolloutSettings

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device, by what they are for."""

    transformer: int
    """Base weights, of both where there are two."""
    text_encoder: int
    """Until the prompts are embedded."""
    autoencoder: int
    """Weights."""
    adapter: int
    """LoRA weights, the slow copies among them."""
    gradients: int
    """Of what learns."""
    optimizer: int
    """Two moments of what learns."""
    trajectory: int
    """Latents and videos of an update, and what is recorded of its steps."""
    sampling: int
    """Most that a pass without gradient holds besides."""
    decoding: int
    """Most that the autoencoder holds besides."""
    learning: int
    """Most that a pass with gradient and its backward pass hold besides."""

    @property
    def embedding_peak(self) -> int:
        """While prompts are embedded: all weights, before anything else is there."""
        return self.transformer + self.text_encoder + self.autoencoder

    @property
    def rollout_peak(self) -> int:
        """While videos are drawn."""
        return self._always + max(self.sampling, self.decoding)

    @property
    def update_peak(self) -> int:
        """While the adapter learns."""
        return self._always + self.gradients + self.learning

    @property
    def peak(self) -> int:
        """The most of all three."""
        return max(self.embedding_peak, self.rollout_peak, self.update_peak)

    @property
    def _always(self) -> int:
        return self.transformer + self.autoencoder + self.adapter + self.optimizer + self.trajectory

    def rows(self) -> dict[str, float]:
        """Every part and peak in gigabytes."""
        names = [field.name for field in fields(self)]
        names += ["embedding_peak", "rollout_peak", "update_peak", "peak"]
        return {name: getattr(self, name) / GIGABYTE for name in names}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while they are alive; what came before is not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, size=0)
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._meet(tensor, size=tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self.now += size
            self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention that keeps what fused kernels keep: no matrix of all pairs of tokens.

    Torch takes its slow path on the meta device, which would count that matrix.
    """
    functional: Any = torch.nn.functional
    # A TorchFunctionMode would not see what is computed again in a backward pass.
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _attend(query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any) -> Any:
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def most_bytes(function: Callable[[], object]) -> int:
    """Most bytes alive at once of the tensors that a call makes."""
    with fused_attention(), LiveBytes() as count:
        function()
    return count.peak


def estimate_memory(
    generator: AbstractVideoGenerator,
    embeddings: PromptEmbeddings,
    rollout: RolloutSettings,
    *,
    text_encoder: int = 0,
) -> MemoryEstimate:
    """What an update needs on the device, by running its passes on shapes alone.

    Args:
        generator: on the meta device, its LoRA attached, run as it will be (gradient checkpointing,
            tiling); all else follows from its shapes and types.
        embeddings: of one prompt, on the meta device.
        rollout: micro batch, guidance, recorded steps, videos of an update.
        text_encoder: bytes of its weights.

    Raises:
        ValueError: the generator holds numbers.
        RuntimeError: its transformer asks for values, which shapes do not have (Wan 2.2 A14B,
            HunyuanVideo 1.5).
    """
    if generator.device.type != "meta":
        raise ValueError(f"generator must be on the meta device, got one on {generator.device}")
    learning = trained_parameters(generator.transformer)
    videos = rollout.prompts_per_update * rollout.videos_per_prompt
    batch = min(videos, rollout.micro_batch)
    latent = torch.empty((batch, *generator.latent_shape), device="meta")
    text = embeddings[torch.zeros(batch, dtype=torch.long)]
    sigma = torch.tensor(0.5)

    @torch.no_grad()
    def sample() -> None:
        generator.predict(latent, sigma, text, rollout.guidance_scale)

    def learn() -> None:
        prediction = generator.predict(latent, sigma, text, rollout.learning_guidance)
        prediction.square().mean().backward()

    for parameter in learning:  # There from the second micro batch on, and counted by themselves.
        parameter.grad = torch.zeros_like(parameter)

    lora = {id(one) for name, one in generator.transformer.named_parameters() if "lora_" in name}
    own = [one for one in generator.transformer.parameters() if id(one) not in lora]
    pipeline: Any = getattr(generator, "pipeline", None)
    both = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    weights = {id(one): one for part in both if part for one in part.parameters()}
    base = [one for one in weights.values() if id(one) not in lora] or own
    recorded = rollout.stochastic_steps * 3 + 1
    frames = generator.num_frames * 3 * generator.height * generator.width
    return MemoryEstimate(
        transformer=_bytes(base),
        text_encoder=text_encoder,
        autoencoder=_bytes(pipeline.vae.parameters()) if pipeline else 0,
        adapter=_bytes(one for one in generator.transformer.parameters() if id(one) in lora),
        gradients=_bytes(learning),
        optimizer=2 * _bytes(learning),
        trajectory=4 * videos * (recorded * latent[0].numel() + frames),
        sampling=most_bytes(sample),
        decoding=most_bytes(lambda: generator.decode(latent)),
        learning=most_bytes(learn),
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.numel() * one.element_size() for one in parameters)
