"""The local judge against transformers' own processor, forward pass and generate."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cac_reward.judges.base import AbstractJudge
from cac_reward.judges.families import FAMILIES
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import (
    INSPECT_TOOL,
    SCAN_CHOICES,
    VERDICT_CHOICES,
    VERDICT_PREFIX,
    Message,
    inspect_message,
    scan_message,
)
from tests.tiny_judge import build_tiny_judge

CALL = '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.25, 1.00]]}}\n</tool_call>'
ONE_TOKEN_CHOICES = ("Yes", "No", "<tool_call>")


KINDS = [("qwen3_vl", 8, 1)] + [(name, 4, 2) for name in FAMILIES]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} merge {kind[2]}")
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalJudge:
    family, patch_size, merge_size = request.param
    folder = tmp_path_factory.mktemp("judge")
    build_tiny_judge(folder, patch_size=patch_size, merge_size=merge_size, family=family)
    judge = LocalJudge.from_pretrained(folder)
    # The head is tied to the embeddings; with random ones it would repeat the last token for ever.
    head = judge._reader.model.lm_head
    head.weight = torch.nn.Parameter(0.2 * torch.randn_like(head.weight), requires_grad=False)
    return judge


def conversation(num_frames: int, size: tuple[int, int] = (16, 24)) -> tuple[Message, ...]:
    times = [index / 8 for index in range(num_frames)]
    return scan_message(torch.rand(num_frames, 3, *size), times, "brief")


def second_turn(first: tuple[Message, ...], num_frames: int) -> tuple[Message, ...]:
    times = [0.25 + index / 8 for index in range(num_frames)]
    look = inspect_message(torch.rand(num_frames, 3, 24, 32), times, "brief")
    return (*first, Message("assistant", (CALL,)), look)


def mixed_conversations() -> list[tuple[Message, ...]]:
    """Different lengths and picture sizes, one without pictures, out of order of length."""
    return [
        second_turn(conversation(3), 2),
        conversation(2),
        (Message("user", ("Say something.",)),),
        conversation(5, (8, 8)),
        conversation(2),
    ]


def stock_inputs(judge: LocalJudge, one: Sequence[Message], prefix: str) -> dict[str, Tensor]:
    """What transformers' processor makes of one conversation, as the family is asked."""
    processor = judge._reader.processor
    family = judge._reader.model.config.model_type
    if family == "qwen2_5_vl":  # Its template has no turns for tools.
        around = lambda content: ("<tool_response>\n", *content, "\n</tool_response>")  # noqa: E731
        one = [Message("user", around(m.content)) if m.role == "tool" else m for m in one]
    switch = {"enable_thinking": False} if family.startswith("qwen3_5") else {}
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in one
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, **switch)
    text += prefix
    frames = [frame for message in one for frame in message.frames]
    return processor(
        text=[text],
        images=frames or None,
        do_resize=False,
        do_rescale=False,
        return_tensors="pt",
    )


@torch.inference_mode()
def stock_log_prob(judge: LocalJudge, one: Sequence[Message], prefix: str, choice: str) -> Tensor:
    """Sum of token log-probabilities of `choice`, every token in one plain forward pass."""
    processor = judge._reader.processor
    inputs = stock_inputs(judge, one, prefix)
    tokens = processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tokens).to(kinds)], dim=1)
    logits = judge._reader.model(**inputs).logits[0, -tokens.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens.T).sum()


@contextmanager
def counted_passes(judge: LocalJudge) -> Iterator[list[tuple[int, int]]]:
    """The shapes [rows, new tokens] of the forward passes made inside the context."""
    shapes: list[tuple[int, int]] = []
    handle = judge._reader.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


@contextmanager
def favoured(judge: LocalJudge, **bonus: float) -> Iterator[None]:
    """Raise the logits of some tokens, for every position."""
    extra = torch.zeros(judge._reader.model.config.text_config.vocab_size)
    for token, value in bonus.items():
        extra[judge._tokenizer.convert_tokens_to_ids(token)] = value
    handle = judge._reader.model.lm_head.register_forward_hook(lambda _, __, out: out + extra)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("choices", "prefix"),
    [
        (SCAN_CHOICES, ""),
        (VERDICT_CHOICES, VERDICT_PREFIX),
        (ONE_TOKEN_CHOICES, ""),
        (("Yes it does", "Yes it is", "No way", "x"), '{"findings": []}\n'),
    ],
)
def test_choices_weigh_as_in_a_plain_forward_pass(
    judge: LocalJudge, choices: tuple[str, ...], prefix: str
) -> None:
    conversations = mixed_conversations()
    expected = torch.stack(
        [
            torch.stack([stock_log_prob(judge, one, prefix, choice) for choice in choices])
            for one in conversations
        ]
    )
    found = judge.choice_log_probs(conversations, choices=choices, prefix=prefix)
    torch.testing.assert_close(found, expected)
    assert found.std(dim=0).min() > 1e-4, "conversations that differ must weigh differently"


def test_generation_is_transformers_own_greedy_generation(judge: LocalJudge) -> None:
    conversations = mixed_conversations()
    found = judge.generate(conversations, max_new_tokens=12, prefix="<tool_call>")
    for one, answer in zip(conversations, found, strict=True):
        inputs = stock_inputs(judge, one, "<tool_call>")
        tokens = judge._reader.model.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=judge._never_written
        )
        text = judge._tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert answer == "<tool_call>" + text
    assert len(set(found)) > 1


def test_prefixes_may_differ(judge: LocalJudge) -> None:
    conversations = mixed_conversations()[:2]
    prefixes = ["Verdict:", '{"findings": []}\nVerdict:']
    found = judge.choice_log_probs(conversations, choices=VERDICT_CHOICES, prefix=prefixes)
    for row, prefix in enumerate(prefixes):
        alone = judge.choice_log_probs(
            conversations[row : row + 1], choices=VERDICT_CHOICES, prefix=prefix
        )
        torch.testing.assert_close(found[row], alone[0])
    answers = judge.generate(conversations, max_new_tokens=3, prefix=prefixes)
    assert [answer.startswith(one) for answer, one in zip(answers, prefixes, strict=True)]


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 10**6])
def test_the_batch_size_changes_nothing(judge: LocalJudge, max_batch_tokens: int) -> None:
    conversations = mixed_conversations()
    expected = judge.choice_log_probs(conversations, choices=SCAN_CHOICES)
    answers = judge.generate(conversations, max_new_tokens=6)
    small = LocalJudge(
        judge._reader.model,
        judge._reader.processor,
        judge_id="small",
        max_batch_tokens=max_batch_tokens,
    )
    with counted_passes(small) as shapes:
        found = small.choice_log_probs(conversations, choices=SCAN_CHOICES)
    torch.testing.assert_close(found, expected)
    assert small.generate(conversations, max_new_tokens=6) == answers
    assert all(rows == 1 or rows * tokens <= max_batch_tokens for rows, tokens in shapes)
    assert (len(shapes) == 2) == (max_batch_tokens == 10**6)


def test_one_pass_reads_choices_that_differ_at_once(judge: LocalJudge) -> None:
    conversations = [conversation(3) for _ in range(4)]
    with counted_passes(judge) as shapes:
        judge.choice_log_probs(conversations, choices=ONE_TOKEN_CHOICES)
    assert len(shapes) == 1
    with counted_passes(judge) as shapes:
        judge.choice_log_probs(conversations, choices=SCAN_CHOICES)
    assert [tokens for _, tokens in shapes[1:]] == [2], "only 'Verdict:' is read in addition"


def ask_all(
    judge: LocalJudge, clips: list[tuple[Message, ...]]
) -> tuple[Tensor, list[str], Tensor]:
    """The scorer's way through two turns; of turn 2 only every other clip, backwards."""
    first = judge.choice_log_probs(clips, choices=SCAN_CHOICES)
    chosen = clips[::-2]
    calls = judge.generate(chosen, prefix="<tool_call>", max_new_tokens=5)
    torch.manual_seed(1)
    looks = [second_turn(one, 2 + row % 2) for row, one in enumerate(chosen)]
    judge.generate(looks, prefix='{"findings":', max_new_tokens=4)
    last = judge.choice_log_probs(looks, choices=VERDICT_CHOICES, prefix="{}\nVerdict:")
    return first, calls, last


@pytest.mark.parametrize("max_batch_tokens", [150, 10**6])
@pytest.mark.parametrize("max_memory_bytes", [0, 60_000, 2**30])
def test_remembering_changes_nothing(
    judge: LocalJudge, max_batch_tokens: int, max_memory_bytes: int
) -> None:
    clips = [conversation(2 + row % 3) for row in range(7)]
    expected = ask_all(judge, clips)
    model, processor = judge._reader.model, judge._reader.processor
    limits = {"max_batch_tokens": max_batch_tokens, "max_memory_bytes": max_memory_bytes}
    other = LocalJudge(model, processor, judge_id="other", **limits)
    with other.remembering():
        found = ask_all(other, clips)
        kept = sum(read.memory_bytes() for read in other._reader.memory)
    assert kept <= max_memory_bytes
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]
    torch.testing.assert_close(found[2], expected[2])
    assert other._reader.memory is None


def test_remembering_reads_only_what_is_new(judge: LocalJudge) -> None:
    clip = conversation(4)
    with judge.remembering(), judge.remembering():
        judge.choice_log_probs([clip], choices=ONE_TOKEN_CHOICES)
        with counted_passes(judge) as shapes:
            judge.generate([clip], prefix="<tool_call>", max_new_tokens=2)
            judge.choice_log_probs(
                [second_turn(clip, 1)], choices=VERDICT_CHOICES, prefix="Verdict:"
            )
    assert [tokens for _, tokens in shapes[:2]] == [1, 1], "the prefix, then one written token"
    assert shapes[2][1] < 90, "the call and one frame"
    with counted_passes(judge) as shapes:
        judge.generate([clip], prefix="<tool_call>", max_new_tokens=1)
    assert shapes[0][1] > 50, "forgotten once the context ended"


def test_equal_text_about_other_frames_is_not_remembered(judge: LocalJudge) -> None:
    one, other = conversation(3), conversation(3)
    expected = judge.choice_log_probs([other], choices=VERDICT_CHOICES, prefix="Verdict:")
    with judge.remembering():
        judge.choice_log_probs([one], choices=ONE_TOKEN_CHOICES)
        found = judge.choice_log_probs([other], choices=VERDICT_CHOICES, prefix="Verdict:")
    torch.testing.assert_close(found, expected)


def test_threads_do_not_disturb_one_another(judge: LocalJudge) -> None:
    batches = [[conversation(2 + row) for row in range(3)] for _ in range(4)]
    expected = [ask_all(judge, batch)[0] for batch in batches]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with judge.remembering():
            found[number] = ask_all(judge, batches[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        torch.testing.assert_close(found[number], expected[number])


def test_picture_placeholders_are_never_written(judge: LocalJudge) -> None:
    with favoured(judge, **{"<|image_pad|>": 9e3, "<|vision_start|>": 8e3, "a": 7e3}):
        assert judge.generate([conversation(2)], max_new_tokens=3) == ["aaa"]


def test_writing_stops_at_the_end_of_the_turn(judge: LocalJudge) -> None:
    with favoured(judge, **{"<|im_end|>": 9e3}), counted_passes(judge) as shapes:
        assert judge.generate([conversation(2)], max_new_tokens=50, prefix="Yes") == ["Yes"]
    assert len(shapes) == 1


def test_no_conversations_no_answers(judge: LocalJudge) -> None:
    assert judge.generate([], max_new_tokens=1) == []
    assert judge.choice_log_probs([], choices=("Yes", "No")).shape == (0, 2)


def test_tools_and_system_turns_reach_the_model(judge: LocalJudge) -> None:
    clip = conversation(2)
    full = scan_message(torch.rand(2, 3, 16, 16), [0, 1], "full")
    told = judge._reader.renderer.tokenize([clip, full], ["", ""], [INSPECT_TOOL])
    texts = [judge._tokenizer.decode(one.tokens) for one in told]
    assert all('"name": "inspect"' in text for text in texts)
    assert "generated video" in texts[1]
    untold = judge._reader.renderer.tokenize([clip], [""], [])
    assert len(untold[0].tokens) < len(told[0].tokens)


def test_weights_carry_no_gradient_and_stay_in_evaluation_mode(judge: LocalJudge) -> None:
    model = judge._reader.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not judge.choice_log_probs([conversation(2)], choices=("Yes", "No")).requires_grad


@pytest.mark.parametrize("choices", [("Yes",), ("Yes", "Yes"), ("Yes", ""), ()])
def test_choices_must_differ(judge: LocalJudge, choices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choices must be two or more different texts, got"):
        judge.choice_log_probs([conversation(2)], choices=choices)


def test_bad_questions_are_refused(judge: LocalJudge) -> None:
    clip = conversation(2)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        judge.generate([clip], max_new_tokens=0)
    with pytest.raises(ValueError, match="prefix must be one text or one for each of 1 conv"):
        judge.generate([clip], max_new_tokens=1, prefix=["a", "b"])
    for turns, last in ((), "nothing"), ((*clip, Message("assistant", ("x",))), "assistant"):
        with pytest.raises(ValueError, match=f"must end in a turn .* got one ending in {last}"):
            judge.generate([turns], max_new_tokens=1)
    with pytest.raises(ValueError, match="must not hold the model's control tokens, got '<|image"):
        judge.generate([(Message("user", ("a <|image_pad|> b",)),)], max_new_tokens=1)
    with pytest.raises(ValueError, match="sides that are multiples of 8, got 16x20; resize_to"):
        judge.generate([conversation(2, (16, 20))], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_batch_tokens must be at least 1, got 0"):
        LocalJudge(judge._reader.model, judge._reader.processor, judge_id="x", max_batch_tokens=0)


def test_a_damaged_judge_is_noticed(judge: LocalJudge) -> None:
    with pytest.raises(RuntimeError, match="must give finite log-probabilities, got .*float32"):
        judge.probabilities(torch.tensor([[0.0, torch.nan]]))


def test_the_interface_alone_remembers_nothing(judge: LocalJudge) -> None:
    with AbstractJudge.remembering(judge):
        assert judge._reader.memory is None
