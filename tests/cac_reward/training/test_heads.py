"""The classifier's heads against loops over frames, and their file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cac_reward.training.heads import HEADS_FILE, ClassifierHeads, attach_heads
from tests.tiny_judge import build_tiny_judge

WIDTH = 6


def some_heads(width: int = WIDTH, captions: int = 0) -> ClassifierHeads:
    heads = ClassifierHeads(width, captions)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def test_log_odds_are_those_of_each_frame_and_of_the_last(seeds: None) -> None:
    heads = some_heads()
    hidden = torch.randn(4, 9, WIDTH, requires_grad=True)
    # The second clip has no frame; the order within a row is that of time.
    ends = [(0, 2), (0, 5), (2, 1), (2, 3), (2, 8), (3, 0)]
    frames, clips = heads(hidden, torch.tensor(ends))
    for number, (row, place) in enumerate(ends):
        expected = heads.frame.weight[0] @ hidden[row, place] + heads.frame.bias[0]
        torch.testing.assert_close(frames[number], expected)
    for row, place in {0: 5, 2: 8, 3: 0}.items():
        expected = heads.clip.weight[0] @ hidden[row, place] + heads.clip.bias[0]
        torch.testing.assert_close(clips[row], expected)
    assert clips[1] == 0
    clips.sum().backward()
    reached = {tuple(one) for one in hidden.grad.abs().sum(-1).nonzero().tolist()}
    assert reached == {(0, 5), (2, 8), (3, 0)}


@pytest.mark.parametrize("count", [1, 3])
def test_clips_without_any_frame_have_log_odds_zero(count: int) -> None:
    heads = some_heads()
    frames, clips = heads(torch.randn(count, 4, WIDTH), torch.zeros(0, 2, dtype=torch.long))
    assert frames.shape == (0,)
    assert clips.tolist() == [0.0] * count


def test_new_heads_know_nothing() -> None:
    frames, clips = ClassifierHeads(WIDTH)(torch.randn(1, 4, WIDTH), torch.tensor([[0, 2]]))
    assert frames.tolist() == clips.tolist() == [0.0]


def test_low_precision_states_are_read_in_the_heads_own() -> None:
    heads = some_heads()
    hidden = torch.randn(1, 4, WIDTH).bfloat16()
    frames, clips = heads(hidden, torch.tensor([[0, 2]]))
    assert frames.dtype == clips.dtype == torch.float32
    torch.testing.assert_close(frames[0], heads.frame(hidden[0, 2].float())[0])


def test_heads_read_along_with_a_pass_that_was_announced(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(build_tiny_judge(tmp_path))
    heads = attach_heads(model)
    assert attach_heads(model) is heads
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.tensor([[5, 6, 7, 8]])
    ends = torch.tensor([[0, 1], [0, 3]])
    with pytest.raises(RuntimeError, match=r"heads must be told of a pass by watch\(\)"):
        heads.take()
    model(input_ids=ids)
    with pytest.raises(RuntimeError, match=r"before it runs"):
        heads.take()
    heads.watch(ends)
    model(input_ids=ids)
    frames, clips = heads.take()
    states: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(frames, heads.frame(states[0, [1, 3]])[:, 0])
    torch.testing.assert_close(clips, heads.clip(states[0, [3]])[:, 0])
    # One announcement is for one pass.
    model(input_ids=ids)
    with pytest.raises(RuntimeError, match=r"watch\(\)"):
        heads.take()


def test_heads_come_back_from_their_file(tmp_path: Path) -> None:
    old, new = some_heads(), ClassifierHeads(WIDTH)
    assert not new.restore(tmp_path)
    old.save(tmp_path)
    assert new.restore(tmp_path)
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"heads must read states of 7 numbers, got 6 in .*heads"):
        ClassifierHeads(WIDTH + 1).restore(tmp_path)
    save_file({"frame.weight": torch.zeros(1, WIDTH)}, tmp_path / HEADS_FILE)
    with pytest.raises(ValueError, match=r"heads must hold frame.weight, .*, got frame.weight in"):
        new.restore(tmp_path)


def test_heads_that_say_captions_go_on_from_those_that_did_not(tmp_path: Path) -> None:
    """And begin captions of another length anew."""
    for before, after in ((0, 3), (3, 0), (3, 2), (3, 3)):
        old, new = some_heads(captions=before), some_heads(captions=after)
        fresh = None if new.captions is None else new.captions.weight.clone()
        old.save(tmp_path)
        assert set(load_file(tmp_path / HEADS_FILE)) == set(old.state_dict())
        assert new.restore(tmp_path)
        assert torch.equal(new.clip.weight, old.clip.weight)
        if fresh is not None:
            expected = old.captions.weight if before == after else fresh
            assert torch.equal(new.captions.weight, expected)


def test_captions_are_said_off_each_frames_state_by_the_judges_own_words(tmp_path: Path) -> None:
    """Against a loop over frames and tokens; nothing to say costs nothing, and keeps a gradient."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(build_tiny_judge(tmp_path))
    heads = attach_heads(model, 2)
    width = model.config.get_text_config().hidden_size
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    ends = torch.tensor([[0, 1], [1, 2], [1, 3]])
    labels = torch.tensor([[11, 12], [-100, -100], [13, -100]])
    heads.watch(ends, labels)
    states: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    weight, bias = heads.captions.weight.view(2, width, width), heads.captions.bias.view(2, width)
    losses = []
    for (row, place), tokens in zip(ends.tolist(), labels.tolist(), strict=True):
        for at, token in enumerate(tokens):
            if token >= 0:
                said = model.lm_head(weight[at] @ states[row, place] + bias[at])
                losses.append(-said.log_softmax(-1)[token])
    torch.testing.assert_close(heads.caption_loss, torch.stack(losses).mean())
    heads.watch(ends, torch.full((3, 2), -100))
    model(input_ids=ids)
    assert heads.caption_loss.item() == 0
    heads.caption_loss.backward()
    assert heads.captions.weight.grad is not None
    heads.watch(ends)
    model(input_ids=ids)
    assert heads.caption_loss is None
