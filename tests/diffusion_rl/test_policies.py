"""Full fine-tuning: the policies that weights of their own give, and the gradient they learn by."""

import copy

import pytest
import torch
from torch import Tensor, nn

from diffusion_rl.credit import Credit
from diffusion_rl.full_policies import FullPolicies, FullSettings
from diffusion_rl.generators.wan import WanGenerator
from diffusion_rl.lora import AVERAGE, OLD, TRAINED, LoraSettings, attach_lora
from diffusion_rl.optimizers import OptimizerSettings, build_optimizer
from diffusion_rl.policies import (
    REFERENCE,
    attach_full,
    attach_policies,
    full_policies,
    old_policy,
    policies_of,
    reference_policy,
    saved_policy,
    trained_parameters,
    update_average,
    update_old_policy,
)
from diffusion_rl.rollout import RolloutSettings, Trajectory, rollout
from diffusion_rl.row_settings import GrpoSettings, NftSettings
from diffusion_rl.step_losses import replay
from diffusion_rl.transitions import flow_sde, ode
from diffusion_rl.updates import update_policy
from tests.tiny_wan import SIZE, build_tiny_wan
from tests.toy_gaussian import LORA, ToyGenerator

PROMPTS = ["a red circle moves left", "the blue square"]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -1.5])
ALL = FullSettings()


def wan(dtype: torch.dtype = torch.float32) -> WanGenerator:
    return WanGenerator(build_tiny_wan().to(dtype), **SIZE)


def velocity(generator: ToyGenerator | WanGenerator) -> Tensor:
    embeddings = generator.encode_prompts(PROMPTS)
    latent = generator.initial_latents([0, 1])
    return generator.predict(latent, torch.tensor(0.5), embeddings, 1.0).detach()


def shake(generator: ToyGenerator | WanGenerator, std: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in trained_parameters(generator.transformer):
            parameter.add_(torch.randn_like(parameter) * std)
    policies_of(generator.transformer).sync()


def drawn(generator: WanGenerator, options: RolloutSettings, stochastic: tuple) -> Trajectory:
    embeddings = generator.encode_prompts(PROMPTS)
    return rollout(
        generator,
        embeddings,
        torch.arange(4) % 2,
        range(4),
        options,
        transition=flow_sde if stochastic else ode,
        stochastic=stochastic,
    )


OPTIONS = RolloutSettings(num_inference_steps=3, stochastic_steps=2, micro_batch=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", ["device", "cpu"])
def test_fresh_policies_are_all_the_base_to_the_bit(dtype: torch.dtype, copies: str) -> None:
    generator = wan(dtype)
    before = velocity(generator)
    settings = FullSettings(copies=copies)
    parameters = attach_policies(generator.transformer, settings, old_policy=True, average=True)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(map(torch.numel, parameters)) == sum(
        map(torch.numel, build_tiny_wan().transformer.parameters())
    )
    for policy in (TRAINED, REFERENCE, OLD, AVERAGE):
        with policies_of(generator.transformer).use(policy):
            assert torch.equal(velocity(generator), before)
    assert torch.equal(velocity(generator), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_base_and_the_trained_comes_back(dtype: torch.dtype) -> None:
    generator = wan(dtype)
    base = velocity(generator)
    attach_policies(generator.transformer, ALL)
    shake(generator)
    tuned = velocity(generator)
    assert not torch.equal(tuned, base)
    with reference_policy(generator.transformer):
        assert torch.equal(velocity(generator), base)
        assert not torch.is_grad_enabled()
    with pytest.raises(KeyError), reference_policy(generator.transformer):
        raise KeyError
    assert torch.equal(velocity(generator), tuned)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slow_copies_follow_by_their_decay_in_float32(dtype: torch.dtype) -> None:
    generator = wan(dtype)
    attach_policies(generator.transformer, ALL, old_policy=True, average=True)
    policies = policies_of(generator.transformer)
    base = policies.state(OLD)
    shake(generator)
    trained = policies.state()
    update_old_policy(generator.transformer, decay=0.75)
    update_average(generator.transformer, decay=0.5, update=9)  # 8 / 17 is above neither limit.
    for policy, share in ((OLD, 0.75), (AVERAGE, 8 / 17)):
        state = policies.state(policy)
        for name, value in state.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, share * base[name] + (1 - share) * trained[name])
        expected = copy.deepcopy(build_tiny_wan().transformer).to(dtype)
        expected.load_state_dict({name: value.to(dtype) for name, value in state.items()})
        with (
            old_policy(generator.transformer)
            if policy == OLD
            else saved_policy(generator.transformer)
        ):
            own = dict(generator.transformer.named_parameters())
            for name, value in expected.named_parameters():
                assert torch.equal(own[name], value)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got -0.5"):
        update_old_policy(generator.transformer, decay=-0.5)


def test_steps_too_small_for_half_precision_add_up_in_the_masters() -> None:
    generator = wan(torch.bfloat16)
    parameters = attach_policies(generator.transformer, ALL)
    places = list(full_policies(generator.transformer).places.values())
    place, master = next(
        (one, other)
        for one, other in zip(places, parameters, strict=True)
        if one.dtype == torch.bfloat16
    )
    before = place.detach().clone()
    assert bool(before.all())
    step = before.float().abs() * 2**-11  # At most an eighth of the last bit.
    for _ in range(2):
        with torch.no_grad():
            master.add_(step)
        policies_of(generator.transformer).sync()
    assert torch.equal(place, before)
    for _ in range(30):
        with torch.no_grad():
            master.add_(step)
        policies_of(generator.transformer).sync()
    assert not bool((place == before).any())
    assert torch.equal(place, master.to(torch.bfloat16))


@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_some_weights_is_plain_autograds(
    dtype: torch.dtype, micro_batch: int
) -> None:
    """At ratio 1 the surrogate's gradient is -mean of advantage x gradient of log_prob."""
    settings = FullSettings(targets=("blocks.1.attn1.to_q", "proj_out.bias"))
    generator, plain = wan(dtype), wan(dtype)
    parameters = attach_policies(generator.transformer, settings)
    own = plain.transformer
    expected_of = [
        *(own.blocks[1].attn1.to_q.weight, own.blocks[1].attn1.to_q.bias, own.proj_out.bias)
    ]
    assert [p.shape for p in parameters] == [p.shape for p in expected_of]
    for parameter in expected_of:
        parameter.requires_grad_(True)
    options = RolloutSettings(num_inference_steps=3, micro_batch=micro_batch)
    trajectory = drawn(plain, options, (0, 1))
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in expected_of]
    for row in range(0, 4, micro_batch):
        part = slice(row, row + micro_batch)
        for k in range(2):
            log_prob = replay(plain, trajectory, k, part, options).log_prob
            loss = -(ADVANTAGES[part] * log_prob).sum() / 8
            for total, one in zip(expected, torch.autograd.grad(loss, expected_of), strict=True):
                total += one.float()
    found = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            found.append([parameter.grad.clone() for parameter in parameters])

    recorder = Recorder([{"params": parameters, "max_grad_norm": 1e9}], lr=1.0)
    trajectory = drawn(generator, options, (0, 1))
    update_policy(
        generator,
        trajectory,
        Credit(ADVANTAGES),
        GrpoSettings(),
        options,
        recorder,
        torch.Generator(),
    )
    for one, other in zip(found[0], expected, strict=True):
        assert one.dtype == torch.float32
        assert bool(other.any())
        torch.testing.assert_close(one, other)
    learning = {name for name, p in generator.transformer.named_parameters() if p.requires_grad}
    assert learning == {
        *("blocks.1.attn1.to_q.weight", "blocks.1.attn1.to_q.bias", "proj_out.bias")
    }


@pytest.mark.parametrize("learner", ["lora", "full"])
@pytest.mark.parametrize("row", [GrpoSettings(kl_weight=0.1), NftSettings(inner_steps=1)])
def test_one_update_of_a_half_precision_generator(
    row: GrpoSettings | NftSettings, learner: str
) -> None:
    """bfloat16 weights, a float32 learner: it moves, what does not learn stays to the bit."""
    generator = wan(torch.bfloat16)
    base = copy.deepcopy(generator.transformer.state_dict())
    settings = ALL if learner == "full" else LoraSettings(rank=2)
    parameters = attach_policies(generator.transformer, settings, old_policy=row.name == "nft")
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    trajectory = drawn(generator, OPTIONS, (0, 1) if row.name == "grpo" else ())
    optimizer = build_optimizer(parameters, OptimizerSettings(learning_rate=1e-2))
    before = policies_of(generator.transformer).state()
    source = torch.Generator().manual_seed(0)
    statistics = update_policy(
        generator, trajectory, Credit(ADVANTAGES), row, OPTIONS, optimizer, source
    )
    assert 0 < statistics.grad_norm < float("inf")
    after = policies_of(generator.transformer).state()
    # A fresh LoRA's first matrices have no gradient yet.
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_A" not in name}
    with reference_policy(generator.transformer):
        state = generator.transformer.state_dict()
        for name, value in base.items():
            held = state[name] if name in state else state[_of_base_layer(name)]
            assert held.dtype == value.dtype
            assert torch.equal(held, value)


def _of_base_layer(name: str) -> str:
    layer, _, weight = name.rpartition(".")
    return f"{layer}.base_layer.{weight}"


def test_loaded_weights_need_no_masters_and_no_gradient() -> None:
    generator = wan(torch.bfloat16)
    policies = attach_full(generator.transformer, FullSettings(copies="cpu"), learns=False)
    assert all(policies.trained[name] is place for name, place in policies.places.items())
    assert not any(place.requires_grad for place in policies.places.values())


def test_targets_name_weights_and_layers_by_their_ends() -> None:
    transformer = build_tiny_wan().transformer
    found = FullPolicies(transformer, FullSettings(targets=("blocks.0", "attn2.to_k.bias"))).places
    names = [name for name, _ in transformer.named_parameters()]
    assert list(found) == [
        name for name in names if name.startswith("blocks.0.") or name.endswith(".attn2.to_k.bias")
    ]
    with pytest.raises(ValueError, match="must name weights or layers .*, got 'o_k'; it has"):
        FullPolicies(transformer, FullSettings(targets=("to_k", "o_k")))


def test_a_transformer_carries_one_or_the_other_and_no_odd_types() -> None:
    for first in (LORA, ALL):
        for second in (LORA, ALL):
            generator = ToyGenerator()
            attach_policies(generator.transformer, first)
            with pytest.raises(ValueError, match="must carry no adapter and no learnt weights yet"):
                attach_policies(generator.transformer, second)
    odd = nn.Linear(2, 2)
    odd.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="must let float32, .* learn, got weight of torch.float8"):
        attach_full(odd, ALL)


def test_an_adapter_learns_through_the_same_interface() -> None:
    generator = ToyGenerator()
    attach_lora(generator.transformer, LORA, average=True)
    policies = policies_of(generator.transformer)
    assert full_policies(generator.transformer) is None
    assert [policies.has(name) for name in (TRAINED, REFERENCE, OLD, AVERAGE)] == [
        *(True, True, False, True)
    ]
    before = velocity(generator)
    shake(generator)
    update_average(generator.transformer, 0.5, update=2)
    tuned = velocity(generator)
    with saved_policy(generator.transformer):
        assert not torch.equal(velocity(generator), tuned)
    with policies.use(REFERENCE):
        assert torch.equal(velocity(generator), before)
    assert torch.equal(velocity(generator), tuned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ()}, "targets must name at least one weight or layer, got none"),
        ({"copies": "disk"}, "copies must be one of device, cpu, got disk"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullSettings(**options)


def test_log_probabilities_of_a_half_precision_transformer_are_float32() -> None:
    """Against flow_sde's closed form in float64, from the very bfloat16 outputs of each pass."""
    generator = wan(torch.bfloat16)
    attach_policies(generator.transformer, LoraSettings(rank=2))
    velocities = []

    def record(module: nn.Module, inputs: object, output: tuple) -> None:
        assert output[0].dtype == torch.bfloat16
        velocities.append(output[0].detach().double())

    generator.transformer.register_forward_hook(record)
    trajectory = drawn(generator, OPTIONS, (0, 1))
    of_steps = [torch.cat(velocities[2 * k : 2 * k + 2]) for k in range(2)]  # Two micro batches.
    for index, place in enumerate(trajectory.steps[:, 0].tolist()):
        sigma, next_sigma = trajectory.sigmas[place : place + 2].double()
        cut = sigma if place else trajectory.sigmas[1].double()
        diffusion = OPTIONS.noise_level * (sigma / (1 - cut)).sqrt()
        dt, drift = next_sigma - sigma, diffusion**2 / (2 * sigma)
        latent = trajectory.latents[index].double()
        mean = latent * (1 + drift * dt) + of_steps[index] * (1 + drift * (1 - sigma)) * dt
        std = diffusion * (-dt).sqrt()
        after = trajectory.next_latents[index].double()
        expected = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)
        found = trajectory.log_probs[:, index]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        coarse = torch.distributions.Normal(mean.bfloat16(), std.bfloat16())
        rounded = coarse.log_prob(after.bfloat16()).flatten(1).mean(1)
        assert (rounded.double() - expected).abs().max() > 1e-3  # What half precision would give.
        again = torch.cat(
            [
                replay(generator, trajectory, index, slice(s, s + 2), OPTIONS).log_prob
                for s in (0, 2)
            ]
        )
        assert torch.equal(again.detach(), found)
