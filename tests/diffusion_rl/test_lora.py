"""The three policies of one transformer, and the LoRA on its way to diffusers and back."""

import copy
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from diffusion_rl.generators.base import LORA_FILE
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import (
    OLD,
    LoraSettings,
    attach_lora,
    lora_state,
    old_policy,
    reference_policy,
    trained_parameters,
    tuner_layers,
)
from diffusion_rl.lora_files import load_lora, lora_bytes, save_lora
from diffusion_rl.policies import update_old_policy
from diffusion_rl.sampling import sample_videos
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan
from tests.toy_gaussian import LORA, ToyGenerator

WAN_LORA = LoraSettings(rank=2, alpha=8)
PROMPTS = ["a red circle moves left", "the blue square"]


def shake(generator: ToyGenerator | WanGenerator) -> None:
    """Give the adapter weights that change something."""
    for parameter in trained_parameters(generator.transformer):
        torch.nn.init.normal_(parameter, std=0.3)


def velocity(generator: ToyGenerator) -> torch.Tensor:
    embeddings = generator.encode_prompts(["plain", "bright"])
    return generator.predict(
        generator.initial_latents([0, 1]), torch.tensor(0.5), embeddings, 1.0
    ).detach()


@pytest.fixture
def toy() -> ToyGenerator:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, old_policy=True)
    return generator


def test_a_fresh_adapter_changes_nothing() -> None:
    generator = ToyGenerator()
    before = velocity(generator)
    parameters = attach_lora(generator.transformer, LORA, old_policy=True)
    assert torch.equal(velocity(generator), before)
    with old_policy(generator.transformer):
        assert torch.equal(velocity(generator), before)
    assert [p.shape for p in parameters] == [(2, 5), (3, 2)]


def test_only_the_trained_adapter_carries_gradient(toy: ToyGenerator) -> None:
    def learning() -> set[str]:
        return {name for name, p in toy.transformer.named_parameters() if p.requires_grad}

    expected = {f"shift.lora_{half}.default.weight" for half in "AB"}
    assert learning() == expected
    with old_policy(toy.transformer):
        assert not any(OLD in name for name in learning())
    with reference_policy(toy.transformer):
        pass
    assert learning() == expected


def test_reference_is_the_base_and_comes_back_after_an_error(toy: ToyGenerator) -> None:
    base = velocity(toy)
    shake(toy)
    tuned = velocity(toy)
    assert not torch.equal(tuned, base)
    with reference_policy(toy.transformer):
        assert torch.equal(velocity(toy), base)
    with pytest.raises(KeyError), reference_policy(toy.transformer):
        raise KeyError
    assert torch.equal(velocity(toy), tuned)


def test_the_old_policy_follows_by_its_decay(toy: ToyGenerator) -> None:
    old = lora_state(toy.transformer, OLD)
    shake(toy)
    trained = lora_state(toy.transformer)
    assert not torch.equal(old["shift.lora_B.weight"], trained["shift.lora_B.weight"])
    update_old_policy(toy.transformer, decay=0.75)
    for name, value in lora_state(toy.transformer, OLD).items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * trained[name])
    update_old_policy(toy.transformer, decay=0.0)
    tuned = velocity(toy)
    with old_policy(toy.transformer):
        torch.testing.assert_close(velocity(toy), tuned)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        update_old_policy(toy.transformer, decay=1.5)


def test_the_old_policy_leaves_no_trace(toy: ToyGenerator) -> None:
    """It is added to the model's own weights for the time; those must come back to the bit."""
    shake(toy)
    update_old_policy(toy.transformer, decay=0.0)
    shake(toy)
    tuned = velocity(toy)
    weights = copy.deepcopy(toy.transformer.state_dict())
    with old_policy(toy.transformer):
        assert not torch.allclose(velocity(toy), tuned)
    with pytest.raises(KeyError), old_policy(toy.transformer):
        raise KeyError
    after = toy.transformer.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(velocity(toy), tuned)


def test_in_half_precision_the_old_policy_is_an_adapter() -> None:
    generator = WanGenerator(build_tiny_wan().to(torch.bfloat16), **SIZE)
    attach_lora(generator.transformer, WAN_LORA, old_policy=True)
    shake(generator)
    update_old_policy(generator.transformer, decay=0.0)
    embeddings = generator.encode_prompts(PROMPTS)
    inputs = (generator.initial_latents([0, 1]), torch.tensor(0.5), embeddings, 1.0)
    trained = generator.predict(*inputs)
    with old_policy(generator.transformer):
        assert torch.equal(generator.predict(*inputs), trained)


def test_without_an_old_policy_there_is_none_to_use() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA)
    with (
        pytest.raises(RuntimeError, match="must have an old policy"),
        old_policy(generator.transformer),
    ):
        pass


def test_the_seed_fixes_the_fresh_adapter() -> None:
    states = []
    for seed in (0, 0, 1):
        generator = ToyGenerator()
        attach_lora(generator.transformer, LORA, seed=seed)
        states.append(lora_state(generator.transformer)["shift.lora_A.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_diffusers_loads_the_lora_and_makes_the_same_videos(
    tmp_path: Path, guidance: float
) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    generator = WanGenerator.from_pretrained(folder, **SIZE, batched_guidance=False)
    options = {"num_inference_steps": 3, "guidance_scale": guidance}
    base = sample_videos(generator, PROMPTS, [3, 4], **options)
    attach_lora(generator.transformer, WAN_LORA)
    shake(generator)
    videos = sample_videos(generator, PROMPTS, [3, 4], **options)
    assert not torch.allclose(videos, base)
    save_lora(generator, tmp_path / "lora")

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPTS,
        height=16,
        width=16,
        num_frames=5,
        latents=generator.initial_latents([3, 4]),
        output_type="pt",
        max_sequence_length=12,
        **options,
    ).frames
    assert torch.equal(videos, stock)
    names = load_file(tmp_path / "lora" / LORA_FILE)
    assert all(name.startswith("transformer.blocks.") for name in names)

    again = WanGenerator.from_pretrained(folder, **SIZE, batched_guidance=False)
    load_lora(again, tmp_path / "lora")
    assert torch.equal(sample_videos(again, PROMPTS, [3, 4], **options), videos)


def test_a_lora_saved_by_diffusers_without_settings_loads(tmp_path: Path) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    attach_lora(generator.transformer, LoraSettings(rank=2, alpha=2))
    shake(generator)
    WanPipeline.save_lora_weights(tmp_path, lora_state(generator.transformer))
    again = WanGenerator(build_tiny_wan(), **SIZE)
    load_lora(again, tmp_path)
    state, expected = lora_state(again.transformer), lora_state(generator.transformer)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_loading_over_an_adapter_replaces_it(toy: ToyGenerator, tmp_path: Path) -> None:
    shake(toy)
    tuned = velocity(toy)
    save_lora(toy, tmp_path)
    shake(toy)
    assert not torch.equal(velocity(toy), tuned)
    load_lora(toy, tmp_path)
    assert torch.equal(velocity(toy), tuned)


def test_adapter_weights_are_float32_on_a_half_precision_model() -> None:
    generator = WanGenerator(build_tiny_wan().to(torch.bfloat16), **SIZE)
    parameters = attach_lora(generator.transformer, WAN_LORA)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


@pytest.mark.parametrize("other", [{"layers": 1}, {"layers": 3}, {"heads": 4}])
def test_the_lora_of_another_model_is_refused(tmp_path: Path, other: dict) -> None:
    generator = WanGenerator(build_tiny_wan(), **SIZE)
    attach_lora(generator.transformer, WAN_LORA)
    save_lora(generator, tmp_path)
    stranger = WanGenerator(build_tiny_wan(**other), **SIZE)
    attach_lora(stranger.transformer, WAN_LORA)
    with pytest.raises(ValueError, match="must fit the generator's transformer, got 40 weights"):
        load_lora(stranger, tmp_path)
    for bare in (WanGenerator(build_tiny_wan(**other), **SIZE), ToyGenerator()):
        with pytest.raises(ValueError, match="belongs to another model or to other lora settings"):
            load_lora(bare, tmp_path)
        assert not tuner_layers(bare.transformer)  # Refused before anything was touched.


def test_files_that_are_no_lora_are_refused(toy: ToyGenerator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"lora must be a folder with a {LORA_FILE}"):
        load_lora(toy, tmp_path)
    file = tmp_path / LORA_FILE
    for content in (b"", b"not a safetensors file at all", lora_bytes(toy.transformer)[:-10]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="lora must be a safetensors file, got"):
            load_lora(toy, tmp_path)
    save_file({"base_model.model.shift.lora_A.weight": torch.zeros(2, 5)}, file)
    with pytest.raises(ValueError, match="must have weights named transformer.\\*, got base_model"):
        load_lora(toy, tmp_path)
    save_file(
        {f"transformer.{name}.lora_A.weight": torch.zeros(n + 1, 5) for n, name in enumerate("ab")},
        file,
    )
    with pytest.raises(ValueError, match=r"lora must have one rank, got \[1, 2\]"):
        load_lora(toy, tmp_path)


def test_saving_or_attaching_at_the_wrong_time_is_refused(tmp_path: Path) -> None:
    generator = ToyGenerator()
    with pytest.raises(ValueError, match="generator must carry a LoRA to save, got none"):
        save_lora(generator, tmp_path)
    attach_lora(generator.transformer, LORA)
    with pytest.raises(ValueError, match="must carry no adapter yet"):
        attach_lora(generator.transformer, LORA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be above 0 and finite, got 0"),
        ({"alpha": math.inf}, "alpha must be above 0 and finite, got inf"),
        ({"targets": ()}, "targets must name at least one layer, got none"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**options)


def test_a_target_that_does_not_exist_is_refused() -> None:
    settings = LoraSettings(targets=("shift", "to_q"))
    with pytest.raises(ValueError, match="targets must name linear layers .*'to_q'; it has shift"):
        attach_lora(ToyGenerator().transformer, settings)


def test_rank_stabilized_scales_by_the_root_of_the_rank_in_every_loader(tmp_path: Path) -> None:
    """rsLoRA (arXiv:2312.03732): alpha / sqrt(rank), which files say as a common alpha."""
    folder = save_tiny_wan(tmp_path / "pipeline")
    videos = []
    for settings in (
        LoraSettings(rank=4, alpha=2, rank_stabilized=True),
        LoraSettings(rank=4, alpha=4),
        LoraSettings(rank=4, alpha=2),
    ):
        generator = WanGenerator.from_pretrained(folder, **SIZE)
        attach_lora(generator.transformer, settings)
        torch.manual_seed(0)
        shake(generator)
        videos.append(sample_videos(generator, PROMPTS, [3, 4], num_inference_steps=2))
        if settings.rank_stabilized:
            save_lora(generator, tmp_path / "lora")
    assert torch.equal(videos[0], videos[1])
    assert not torch.allclose(videos[0], videos[2])
    again = WanGenerator.from_pretrained(folder, **SIZE)
    load_lora(again, tmp_path / "lora")
    assert torch.equal(sample_videos(again, PROMPTS, [3, 4], num_inference_steps=2), videos[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_its_formula_and_starts_as_the_base(dtype: torch.dtype) -> None:
    """W' = m * (W + s B A) / |W + s B A| row by row (arXiv:2402.09353), m = |W| at first."""
    generator = WanGenerator(build_tiny_wan().to(dtype), **SIZE)
    embeddings = generator.encode_prompts(PROMPTS)
    inputs = (generator.initial_latents([0, 1]), torch.tensor(0.5), embeddings, 1.0)
    before = generator.predict(*inputs)
    settings = LoraSettings(rank=2, alpha=3, dora=True)
    parameters = attach_lora(generator.transformer, settings, old_policy=True)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    layers = tuner_layers(generator.transformer)
    assert len(parameters) == 3 * len(layers)
    close = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}  # bfloat16's 8 bits.
    torch.testing.assert_close(generator.predict(*inputs), before, **close)
    shake(generator)
    tuned = generator.predict(*inputs)
    assert (tuned - before).abs().max() > 0.05
    with reference_policy(generator.transformer):
        assert torch.equal(generator.predict(*inputs), before)
    with old_policy(generator.transformer):
        torch.testing.assert_close(generator.predict(*inputs), before, **close)
    update_old_policy(generator.transformer, 0.0)
    with old_policy(generator.transformer):
        assert torch.equal(generator.predict(*inputs), tuned)
    layer = layers[0]
    base = layer.base_layer.weight.float()
    direction = base + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    whole = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, base.shape[1], dtype=dtype)
    expected = x.float() @ whole.T + layer.base_layer.bias.float()
    torch.testing.assert_close(layer(x).float(), expected, **close)


def test_diffusers_loads_a_dora_and_makes_the_same_videos(tmp_path: Path) -> None:
    folder = save_tiny_wan(tmp_path / "pipeline")
    generator = WanGenerator.from_pretrained(folder, **SIZE)
    attach_lora(generator.transformer, LoraSettings(rank=2, alpha=3, dora=True))
    shake(generator)
    videos = sample_videos(generator, PROMPTS, [3, 4], num_inference_steps=2)
    save_lora(generator, tmp_path / "lora")
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    stock = WanGenerator(pipeline, **SIZE)
    again = WanGenerator.from_pretrained(folder, **SIZE)
    load_lora(again, tmp_path / "lora")
    for other in (stock, again):
        found = sample_videos(other, PROMPTS, [3, 4], num_inference_steps=2)
        torch.testing.assert_close(found, videos)


def test_first_values_are_as_asked_for() -> None:
    spreads = {}
    for init in ("kaiming", "gaussian"):
        generator = WanGenerator(build_tiny_wan(), **SIZE)
        attach_lora(generator.transformer, LoraSettings(rank=8, init=init))
        state = lora_state(generator.transformer)
        values = [value.flatten() for name, value in state.items() if "lora_A" in name]
        spreads[init] = torch.cat(values).std().item()
        assert torch.cat(values).abs().max() > 0
        assert not any(bool(value.any()) for name, value in state.items() if "lora_B" in name)
    # Of some thousand values each.
    assert 0.95 < 8 * spreads["gaussian"] < 1.05
    assert not 0.95 < 8 * spreads["kaiming"] < 1.05
    with pytest.raises(ValueError, match="init must be one of kaiming, gaussian, got pissa; those"):
        LoraSettings(init="pissa")


def test_dora_has_no_magnitude_to_learn_where_weights_are_zero() -> None:
    with pytest.raises(ValueError, match="dora must adapt layers without an output that is always"):
        attach_lora(ToyGenerator().transformer, LoraSettings(targets=("shift",), dora=True))
