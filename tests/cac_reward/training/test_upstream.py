"""What is overridden or called of TRL and transformers though it is private or undocumented.

If an upgrade breaks one of these, look at the named method of `cac_reward/training` first.
"""

import inspect
from typing import Any

import pytest
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

BOTH = (SFTTrainer, GRPOTrainer)
CALLED: list[tuple[tuple[type, ...], str, list[str]]] = [
    (BOTH, "_save_checkpoint", ["self", "model", "trial"]),
    (BOTH, "_save", ["self", "output_dir", "state_dict"]),
    (BOTH, "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    (BOTH, "_load_best_model", ["self"]),
    (BOTH, "_determine_best_metric", ["self", "metrics", "trial"]),
    (BOTH, "_clip_grad_norm", ["self", "model"]),
    (BOTH, "create_model_card", ["self", "model_name", "dataset_name", "tags"]),
    ((GRPOTrainer,), "_generate", ["self", "prompts"]),
    ((GRPOTrainer,), "_generate_and_score_completions", ["self", "inputs"]),
    (
        (GRPOTrainer,),
        "_generate_single_turn",
        [
            *("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
            "has_tool_images",
        ],
    ),
]
READ = {
    SFTTrainer: ["_metrics", "model_accepts_loss_kwargs"],
    GRPOTrainer: [
        *("_metrics", "_tokenizer", "eos_token_ids", "generation_config", "tools"),
        *("num_generations", "num_generations_eval", "use_vllm", "vllm_generation"),
    ],
}
"""Attributes of TRL's trainers that ours read or set."""


@pytest.mark.parametrize(("trainers", "name", "arguments"), CALLED, ids=[one[1] for one in CALLED])
def test_methods_that_we_override_or_call_are_as_they_were(
    trainers: tuple[type, ...], name: str, arguments: list[str]
) -> None:
    for trainer in trainers:
        method = getattr(trainer, name, None)
        assert method is not None, f"{trainer.__name__}.{name} is gone"
        found = list(inspect.signature(method).parameters)
        assert found == arguments, f"{trainer.__name__}.{name} takes {found}"


@pytest.mark.parametrize("trainer", READ, ids=lambda one: one.__name__)
def test_attributes_that_we_read_are_still_set(trainer: type) -> None:
    source = "".join(inspect.getsource(one) for one in trainer.__mro__ if one is not object)
    missing = [name for name in READ[trainer] if f"self.{name}" not in source]
    assert missing == []


def test_generate_still_returns_what_is_unpacked() -> None:
    """`JudgeGRPOTrainer._generate` returns these eight, in this order."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    taken = source[: source.index(") = self._generate(prompts)")].rpartition("(")[2]
    assert [one.strip() for one in taken.split(",") if one.strip()] == [
        *("prompt_ids_list", "completion_ids_list", "tool_mask_list", "completions"),
        *("sampling_per_token_logps_list", "extra_fields", "images", "tool_images"),
    ]
    # With tools, pictures are taken from the answers too, by the image processor alone.
    assert "if self.tools and any(imgs for imgs in tool_images) and self._is_vlm" in source
    assert "log_metric" in inspect.getsource(GRPOTrainer._calculate_rewards)


def test_the_fused_output_still_tells_what_the_loss_reads() -> None:
    source = inspect.getsource(SFTTrainer)
    assert 'outputs=("log_probs", "entropy", "is_top1")' in source
    assert "fused_lm_head=True" in source


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (SFTConfig, ["dataset_kwargs", "train_sampling_strategy", "max_length"]),
        (GRPOConfig, ["num_iterations", "shuffle_dataset", "generation_kwargs", "log_multimodal"]),
    ],
)
def test_options_that_we_set_exist(config: Any, names: list[str]) -> None:
    known = {*inspect.signature(config).parameters}
    assert {*names, "logging_nan_inf_filter", "ddp_find_unused_parameters"} <= known


def test_what_a_step_calls_it_calls_in_this_order() -> None:
    """A gradient that is no number must be seen before it moves a weight."""
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self._clip_grad_norm(model)") < source.index("self.optimizer.step()")
