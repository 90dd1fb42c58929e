"""TRL's reward_funcs, inside one step of the real GRPOTrainer with a tiny language model."""

import math
from pathlib import Path

import pytest
import torch

from cac_reward.adapters.trl import trl_reward
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    mp4,
    red_of,
)

WORDS = ("cup", "dog", "ball", "hand", "table", "door")


def render(texts: list[str]) -> list[torch.Tensor]:
    """A clip for each text, redder with each word and as long as there are words."""
    counts = [2 + len(text.split()) for text in texts]
    return [as_float(clip(10 * count, num_frames=count)) for count in counts]


def call(reward, completions: list, **columns) -> list[float | None]:
    """How the trainer calls a reward function."""
    prompts = ["write a prompt"] * len(completions)
    ids = [[1]] * len(completions)
    return reward(prompts=prompts, completions=completions, completion_ids=ids, **columns)


def test_by_keyword_with_every_column() -> None:
    scorer, told = StubScorer(), {}
    reward = trl_reward(scorer, render=render, fps=FPS)
    assert reward.__name__ == "cac_reward"  # What TRL logs it as.
    rewards = call(
        reward,
        ["a cup", [{"role": "assistant", "content": "a dog on a door"}]],
        topic=["x", "y"],
        trainer_state=object(),
        log_extra=lambda column, values: None,
        log_metric=told.__setitem__,
    )
    assert rewards == [pytest.approx(40 / 255), pytest.approx(70 / 255)]
    assert all(type(one) is float for one in rewards)
    assert told == {"cac_failed_share": 0}
    assert [prompts for _, prompts, _ in scorer.seen] == [["a cup"], ["a dog on a door"]]


def test_a_column_of_files(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120)))
    scorer = StubScorer()
    rewards = call(trl_reward(scorer, column="video"), ["yes"], video=[str(file)])
    assert rewards == [pytest.approx(red_of(file.read_bytes()))]
    assert scorer.seen[0][1] == ["write a prompt"]


def test_failures() -> None:
    def judge(**failing: object) -> list[float | None]:
        reward = trl_reward(
            StubScorer(),
            render=lambda texts: [as_float(clip(int(text))) for text in texts],
            fps=FPS,
            **failing,
        )
        return call(reward, [str(UNJUDGED), "51"])

    assert judge() == [None, pytest.approx(0.2)]
    assert judge(on_failure=0) == [0, pytest.approx(0.2)]
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        judge(on_failure="raise")


def tiny_language_model():
    """A random Llama and a tokenizer of a few words, built here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


@pytest.mark.slow
def test_a_step_of_the_real_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_language_model()
    before = [parameter.clone() for parameter in model.parameters()]
    scorer = StubScorer()
    drawn: list[str] = []

    def render_all_but_one(texts: list[str]) -> list[torch.Tensor]:
        drawn.extend(texts)
        return [as_float(clip(UNJUDGED)), *render(texts)[1:]]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=trl_reward(scorer, render=render_all_but_one, fps=FPS),
        train_dataset=Dataset.from_dict({"prompt": ["cup dog", "ball hand"], "topic": ["x", "y"]}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=5,
            max_steps=1,
            learning_rate=0.1,
            temperature=1.0,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    wanted = [10 * (2 + len(text.split())) / 255 for text in drawn[1:]]
    assert len(set(wanted)) > 1  # Otherwise there would be nothing to learn.
    assert sum(len(prompts) for _, prompts, _ in scorer.seen) == len(drawn) == 4
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    # The clip that could not be judged takes no part.
    assert logged["rewards/cac_reward/mean"] == pytest.approx(sum(wanted) / 3)
    assert logged["cac_failed_share"] == 0.25
    assert math.isfinite(logged["train_loss"])
    assert math.isfinite(logged["grad_norm"])
    assert any(
        not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)
    )
