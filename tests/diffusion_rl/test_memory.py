"""What is counted on shapes is what tensors of real numbers take, and what the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.generators import build_generator, random_embeddings
from diffusion_rl.generators.settings import ExecutionSettings
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.generators.wan22 import Wan22Generator
from diffusion_rl.lora import LoraSettings, attach_lora
from diffusion_rl.memory import MemoryEstimate, estimate_memory, fused_attention, most_bytes
from diffusion_rl.rollout import RolloutSettings
from tests.tiny_wan22 import A14B_SIZE, build_tiny_a14b

RANK, TEXT, DIM, FFN, HEADS, LAYERS = 4, 8, 24, 48, 2, 2
SIZES = {"height": 32, "width": 64, "num_frames": 9}
ROLLOUT = RolloutSettings(
    num_inference_steps=4,
    stochastic_steps=2,
    prompts_per_update=2,
    videos_per_prompt=3,
    micro_batch=2,
    guidance_scale=4.0,
)


def tiny(device: str, *, checkpointing: bool = False, tiling: bool = False, **size: int) -> Any:
    """The tiny Wan of the benchmarks, in bfloat16, with a LoRA."""
    execution = ExecutionSettings(gradient_checkpointing=checkpointing, vae_tiling=tiling)
    generator = build_generator(
        "tiny", **{**SIZES, **size}, dtype="bfloat16", device=device, execution=execution
    )
    attach_lora(generator.transformer, LoraSettings(rank=RANK))
    return generator


def estimate(**options: Any) -> MemoryEstimate:
    generator = tiny("meta", **options)
    return estimate_memory(generator, random_embeddings("tiny", generator), ROLLOUT)


def test_what_lives_is_counted_once_and_while_it_lives() -> None:
    before = torch.zeros(1000)

    def run() -> None:
        first = before + 1  # 4000
        second = first.view(10, 100).T + 1  # 8000
        del first  # 4000
        second += 1
        third = second[:5].double()  # 4000 + 4000
        del second  # 4000
        third.sum()  # + 8

    assert most_bytes(run) == 8000
    assert most_bytes(lambda: before.view(-1)[:3]) == 0
    assert most_bytes(lambda: [torch.zeros(10) for _ in range(3)]) == 120


def block_bytes(tokens: int, text: int, *, first: bool) -> int:
    """Kept of one Wan block for its backward pass, in bfloat16 with a float32 LoRA.

    Of each video token: thirteen vectors of DIM in float32 (the LoRAs' own copies of what enters
    them are most of these), six in bfloat16 (queries, keys, values, outputs), the feed-forward
    layer's inside in both, the LoRAs' inside, two sums of attention, and nine numbers of norms. Of
    each text token: three vectors in float32, two in bfloat16, two LoRAs' inside, one number. Once:
    eight vectors of modulation. What enters the first block learns nothing, so its norm keeps none.
    """
    video = 13 * 4 * DIM + 6 * 2 * DIM + 2 * FFN + 4 * FFN + 8 * 4 * RANK + 2 * 4 * HEADS + 9 * 4
    words = 3 * 4 * DIM + 2 * 2 * DIM + 2 * 4 * RANK + 4
    norm = (tokens * (4 * DIM + 2 * 4) + 4 * DIM) if first else 0
    return tokens * video + text * words + 8 * 4 * DIM - norm


def kept_bytes(generator: WanGenerator) -> int:
    """Of the blocks, by what autograd is asked to keep; weights and positions left out."""
    transformer = generator.pipeline.transformer
    left_out = {one.untyped_storage().data_ptr() for one in transformer.parameters()}
    left_out |= {one.untyped_storage().data_ptr() for one in transformer.buffers()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage
        return tensor

    def leave_positions_out(module: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        left_out.update(one.untyped_storage().data_ptr() for one in outputs)

    transformer.rope.register_forward_hook(leave_positions_out)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    transformer.blocks[0].register_forward_pre_hook(lambda *_: hooks.__enter__())
    transformer.blocks[-1].register_forward_hook(lambda *_: hooks.__exit__())
    latent = torch.zeros(1, *generator.latent_shape)
    with fused_attention():
        generator.predict(latent, torch.tensor(0.5), random_embeddings("tiny", generator), 1.0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("width", [32, 64])
def test_the_formula_of_the_page_is_what_autograd_keeps(width: int) -> None:
    generator = tiny("cpu", width=width)
    _, frames, high, wide = generator.latent_shape
    tokens = frames * (high // 2) * (wide // 2)
    blocks = [block_bytes(tokens, TEXT, first=block == 0) for block in range(LAYERS)]
    assert kept_bytes(generator) == sum(blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_take_what_numbers_take(checkpointing: bool) -> None:
    found = []
    for device in ("cpu", "meta"):
        generator = tiny(device, checkpointing=checkpointing)
        latent = torch.zeros(2, *generator.latent_shape, device=device)
        text = random_embeddings("tiny", generator)[torch.tensor([0, 0])]

        def learn(own: Any = generator, latent: Tensor = latent, text: Any = text) -> None:
            own.predict(latent, torch.tensor(0.5), text, 4.0).square().mean().backward()

        decode = most_bytes(lambda own=generator, latent=latent: own.decode(latent))
        found.append((most_bytes(learn), decode))
    # Single numbers are copied to another device, and not to the one they are on.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_estimate_adds_up() -> None:
    plain, saving = estimate(), estimate(checkpointing=True)
    generator = tiny("meta")
    named = dict(generator.transformer.named_parameters())
    lora = sum(one.numel() for name, one in named.items() if "lora_" in name)
    base = sum(one.nbytes for name, one in named.items() if "lora_" not in name)
    assert plain.transformer == base
    assert plain.adapter == plain.gradients == 4 * lora
    assert plain.optimizer == 2 * plain.gradients
    latent = 4 * 3 * 4 * 8
    assert plain.trajectory == 4 * 6 * (7 * latent + 9 * 3 * 32 * 64)
    always = plain.transformer + plain.autoencoder + 3 * plain.adapter + plain.trajectory
    assert plain.rollout_peak == always + max(plain.sampling, plain.decoding)
    others = plain.update_peak - plain.learning
    assert others == always + plain.gradients
    assert saving.update_peak == others + saving.learning
    assert saving.learning < 0.7 * plain.learning
    assert saving.sampling == plain.sampling < saving.learning
    assert plain.rows()["peak"] == pytest.approx(plain.peak / 1e9)
    large = {"height": 288, "width": 288, "num_frames": 5}
    assert estimate(**large, tiling=True).decoding < 0.9 * estimate(**large).decoding


def test_the_published_size_has_the_published_parameters() -> None:
    generator = build_generator(
        "wan2.1-1.3b",
        **{"height": 240, "width": 416, "num_frames": 33, "dtype": "bfloat16"},
        **{"device": "meta", "execution": ExecutionSettings()},
    )
    parts = (generator.pipeline.transformer, generator.pipeline.vae)
    count = [sum(one.numel() for one in part.parameters()) for part in parts]
    assert count == [1_418_996_800, 126_892_531]
    assert generator.latent_shape == (16, 9, 30, 52)


def test_only_shapes_can_be_estimated() -> None:
    generator = tiny("cpu")
    with pytest.raises(ValueError, match="generator must be on the meta device, got one on cpu"):
        estimate_memory(generator, random_embeddings("tiny", generator), ROLLOUT)
    two = Wan22Generator(build_tiny_a14b(), **A14B_SIZE)
    text = two.encode_prompts(["a"])
    for part in (two.pipeline.transformer, two.pipeline.transformer_2, two.pipeline.vae):
        part.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        estimate_memory(two, text, ROLLOUT)
