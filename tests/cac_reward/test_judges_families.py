"""Every family's conventions, with tiny random models of its real classes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cac_reward import CaCScorer
from cac_reward.answers import AnswerError, parse_tool_call, write_findings, write_tool_call
from cac_reward.frames import (
    InspectSettings,
    JudgeSettings,
    ScanSettings,
    frame_times,
    inspect_indices,
    resize_to_budget,
)
from cac_reward.judges.base import Conversation
from cac_reward.judges.families import FAMILIES, find_family
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import (
    FINDINGS_PREFIX,
    INSPECT_TOOL,
    TOOL_CALL_PREFIX,
    Message,
    inspect_message,
    scan_message,
)
from cac_reward.report import Box, Finding, TimeWindow
from tests.tiny_judge import build_tiny_judge, published_template

FPS = 8.0
SETTINGS = JudgeSettings(
    wording="full",
    scan=ScanSettings(fps=4.0, max_frames=8, pixels=1024),
    inspect=InspectSettings(fps=8.0, max_frames=6, pixels=4096, margin_seconds=0.0),
)
WINDOW = TimeWindow(0.5, 1.0)
# Odd and extreme: 1 to 40, 40 to 1, odd primes, a square.
SIZES = [(8, 320), (320, 8), (37, 53), (64, 64), (97, 31)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalJudge:
    folder = tmp_path_factory.mktemp("judge")
    build_tiny_judge(folder, patch_size=4, merge_size=2, family=request.param)
    SETTINGS.save(folder)
    return LocalJudge.from_pretrained(folder)


def clip_with_a_patch(size: tuple[int, int], place: tuple[float, float, float, float]) -> Tensor:
    """[13 3 H W] black, with a white patch on whole pixels near `place` (relative)."""
    height, width = size
    x1, y1, x2, y2 = place
    clip = torch.zeros(13, 3, height, width)
    clip[:, :, round(y1 * height) : round(y2 * height), round(x1 * width) : round(x2 * width)] = 1
    return clip


class SeeingJudge(LocalJudge):
    """Its weights are random, but it finds the white patch in the pixels that the model was given.

    The box is measured in the patches that went into the vision encoder and written by hand in the
    family's published convention, without the table under test.
    """

    def generate(
        self, conversations: list[Conversation], *, prefix: str, **rest: object
    ) -> list[str]:
        written = super().generate(conversations, prefix=prefix, **rest)
        assert all(text.startswith(prefix) for text in written)
        self.shown = [one[-1] for one in conversations]
        kind = self._reader.model.config.model_type
        if prefix == TOOL_CALL_PREFIX:
            return [CALLS[kind] for _ in conversations]
        return [self._describe(one[-1], kind) for one in conversations]

    def _describe(self, message: Message, kind: str) -> str:
        pixels = self._reader.processor.image_processor(
            images=list(message.frames), do_resize=False, do_rescale=False, return_tensors="pt"
        )
        rows, columns = pixels["image_grid_thw"][0, 1:].tolist()
        cells = pixels["pixel_values"][: rows * columns].mean(dim=1)
        # Four patches that merge into one token stand together.
        picture = cells.view(rows // 2, columns // 2, 2, 2).transpose(1, 2).reshape(rows, columns)
        inside = (picture > picture.min() + 0.5 * (picture.max() - picture.min())).nonzero()
        top, left = inside.min(dim=0).values.tolist()
        bottom, right = (inside.max(dim=0).values + 1).tolist()
        if kind == "qwen2_5_vl":
            across = down = 4.0
        else:
            across, down = 1000 / columns, 1000 / rows
        box = [round(left * across), round(top * down), round(right * across), round(bottom * down)]
        return json.dumps(
            {
                "findings": [
                    {
                        "type": "vanish",
                        "window": [0.5, 1.0],
                        "boxes": [{"time": 0.5, "box": box}],
                        "severity": 3,
                        "why": "seen",
                    }
                ]
            }
        )


CALLS = {
    "qwen3_vl": '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.5, 1.0]]}}\n'
    "</tool_call>",
    "qwen3_5": "<tool_call>\n<function=inspect>\n<parameter=windows>\n[[0.5, 1.0]]\n</parameter>\n"
    "</function>\n</tool_call>",
}
CALLS |= {"qwen2_5_vl": CALLS["qwen3_vl"], "qwen3_vl_moe": CALLS["qwen3_vl"]}
CALLS["qwen3_5_moe"] = CALLS["qwen3_5"]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_box_comes_back_where_it_was_drawn(judge: LocalJudge, size: tuple[int, int]) -> None:
    place = (0.25, 0.5, 0.75, 1.0)
    model, processor = judge._reader.model, judge._reader.processor
    seeing = SeeingJudge(model, processor, judge_id="seeing", settings=SETTINGS)
    clip = clip_with_a_patch(size, place)
    scorer = CaCScorer(seeing, max_call_tokens=2, max_findings_tokens=2)
    seeing.choice_log_probs = (
        lambda found, *, choices, **_: torch.tensor(  # type: ignore[method-assign]
            [[-2.0, -1.0, -9.0][: len(choices)]] * len(found)
        )
    )
    (report,) = scorer.inspect([clip], fps=FPS)
    assert report.error is None
    assert report.windows == (WINDOW,)
    (box,) = report.findings[0].boxes
    height, width = resize_to_budget(clip, SETTINGS.inspect.pixels, judge.patch_factor).shape[-2:]
    # The patch is seen to the nearest encoder patch of 4 pixels, plus the grid it is written in.
    close_x, close_y = 4 / width + 1 / size[1] + 0.001, 4 / height + 1 / size[0] + 0.001
    for found, drawn, close in zip(
        box.coordinates, place, (close_x, close_y, close_x, close_y), strict=True
    ):
        assert abs(found - drawn) <= close, (box.coordinates, place)
    assert box.time_seconds == 0.5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(28, 2772), (2772, 28), (252, 280), (36, 36)], ids=str)
def test_boxes_survive_writing_and_reading(name: str, size: tuple[int, int]) -> None:
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    height, width = size
    for _ in range(50):
        (x1, x2), (y1, y2) = torch.rand(2, 2, generator=generator).sort(dim=1).values.tolist()
        written = family.box_writer(height, width)((x1, y1, x2, y2))
        across, down = (width, height) if name == "qwen2_5_vl" else (1000, 1000)
        found = family.box_reader(height, width)([float(one) for one in written])
        for a, b, unit in zip(found, (x1, y1, x2, y2), (across, down) * 2, strict=True):
            assert abs(a - b) <= 1.5 / unit  # Half by rounding, one more to be a unit wide.
        assert written == [
            round(a * unit) for a, unit in zip(found, (across, down) * 2, strict=True)
        ]


def test_pixels_outside_the_frame_are_refused() -> None:
    read = FAMILIES["qwen2_5_vl"].box_reader(56, 280)
    assert read([70.0, 28.0, 140.0, 56.0]) == (0.25, 0.5, 0.5, 1.0)
    for box in ([0.0, 0.0, 281.0, 56.0], [0.0, 0.0, 280.0, 57.0], [-1.0, 0.0, 280.0, 56.0]):
        with pytest.raises(ValueError, match="in pixels of a frame 280 wide and 56 high, got"):
            read(box)
    with pytest.raises(ValueError, match="in thousandths"):
        FAMILIES["qwen3_5"].box_reader(56, 280)([0.0, 0.0, 1001.0, 56.0])


def test_the_question_names_the_units_of_boxes() -> None:
    frames, times = torch.rand(2, 3, 56, 280), [0.0, 0.5]
    pixels = inspect_message(frames, times, "full", "pixels").text
    assert "in pixels of these frames, which are 280 wide and 56 high" in pixels
    assert '"box": [87, 14, 179, 32]' in pixels
    assert "thousandths" not in pixels
    assert "thousandths" in inspect_message(frames, times, "full").text
    with pytest.raises(ValueError, match="box_units must be one of .*, got 'inches'"):
        inspect_message(frames, times, "full", "inches")


def two_turns(judge: LocalJudge, fps: float) -> tuple[Message, ...]:
    indices = inspect_indices([TimeWindow(4 / fps, 8 / fps)], 13, fps, SETTINGS.inspect)
    looks = torch.rand(len(indices), 3, 24, 32)
    call = write_tool_call([TimeWindow(4 / fps, 8 / fps)], judge.family.call_format)
    return (
        *scan_message(torch.rand(4, 3, 16, 24), frame_times([0, 3, 6, 9], fps), "full"),
        Message("assistant", (call,)),
        inspect_message(looks, frame_times(indices, fps), "full", judge.family.box_units),
    )


@pytest.mark.parametrize("fps", [8.0, 7.3])
def test_every_frame_follows_its_own_time(judge: LocalJudge, fps: float) -> None:
    conversation = two_turns(judge, fps)
    (one,) = judge._reader.renderer.tokenize([conversation], [""], [INSPECT_TOOL])
    text = judge._tokenizer.decode(one.tokens)
    pads = r"<\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>"
    found = re.findall(r"<(\d+\.\d\d) seconds>" + pads, text)
    indices = inspect_indices([TimeWindow(4 / fps, 8 / fps)], 13, fps, SETTINGS.inspect)
    expected = [index / fps for index in [0, 3, 6, 9, *indices]]
    assert [float(time) for time, _ in found] == [pytest.approx(t, abs=0.006) for t in expected]
    counts = [pads.count("<|image_pad|>") for _, pads in found]
    assert counts == [2 * 3] * 4 + [3 * 4] * len(indices)
    assert text.count("<|image_pad|>") == sum(counts), "no picture without its time"


def test_a_call_is_written_as_the_template_writes_it(judge: LocalJudge) -> None:
    windows = [TimeWindow(0.25, 1.0), TimeWindow(1.5, 2.0)]
    text = write_tool_call(windows, judge.family.call_format)
    assert parse_tool_call(text, 2.0, judge.family.call_format) == tuple(windows)
    kind = judge._reader.model.config.model_type
    if kind == "qwen2_5_vl":  # Its template writes no calls; ours tells it of JSON.
        assert '{"name": NAME, "arguments": {...}}' in rendered(judge)
        return
    function = {"name": "inspect", "arguments": {"windows": [[0.25, 1.0], [1.5, 2.0]]}}
    stock = judge._reader.processor.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        ],
        chat_template=published_template(kind),
        tokenize=False,
    )
    call = stock[stock.index("<tool_call>") : stock.index("</tool_call>") + len("</tool_call>")]
    assert call == text.replace("1.00", "1.0").replace("1.50", "1.5").replace("2.00", "2.0")


def rendered(judge: LocalJudge) -> str:
    return judge._reader.renderer.render(two_turns(judge, FPS), [INSPECT_TOOL])


def test_the_judge_is_told_of_its_tool_and_answers_without_thinking(judge: LocalJudge) -> None:
    text = rendered(judge)
    assert text.count('"name": "inspect"') >= 1
    assert "Kinds of fault" in text
    assert text.count("<|im_start|>system") == 1
    assert text.count("<tool_response>\n") == text.count("\n</tool_response>") == 1
    assert "<|im_start|>tool" not in text
    beginning = judge._reader.renderer.render(two_turns(judge, FPS)[:2], [INSPECT_TOOL])
    assert text.startswith(beginning), "turn 2 goes on from what turn 1 read"
    opened = "<think>\n\n</think>\n\n" if judge.family.call_format == "xml" else ""
    assert text.endswith(f"<|im_start|>assistant\n{opened}")


def test_a_template_that_thinks_first_is_refused(tmp_path: Path) -> None:
    build_tiny_judge(tmp_path, patch_size=4, merge_size=2, family="qwen3_5")
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text().replace("enable_thinking is false", "false"))
    stubborn = LocalJudge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must answer without thinking first, got a chat template"):
        stubborn.generate([two_turns(stubborn, FPS)], max_new_tokens=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CALLS["qwen3_vl"], "must be one <function=inspect> ... </function> and nothing else"),
        (CALLS["qwen3_5"] + " so", "must be one <tool_call> ... </tool_call> and nothing else"),
        (CALLS["qwen3_5"].replace("=windows", "=frames"), "must be one <parameter=windows>"),
        (CALLS["qwen3_5"].replace("[[0.5, 1.0]]", "[]"), "windows must be a list of 1 to 16"),
        (CALLS["qwen3_5"].replace("1.0", "9.0"), "window must lie within the clip's 2.00 s"),
        ("<tool_call>", "must be one <tool_call>"),
    ],
)
def test_other_calls_are_refused(text: str, message: str) -> None:
    with pytest.raises(AnswerError, match=re.escape(message)):
        parse_tool_call(text, 2.0, "xml")


def test_findings_are_taught_in_the_units_they_are_read_in() -> None:
    box = Box(0.5, 0.25, 0.5, 0.75, 1.0)
    finding = Finding("vanish", WINDOW, (box,))
    text = write_findings([finding], FAMILIES["qwen2_5_vl"].box_writer(56, 280))
    assert '"box": [70, 28, 210, 56]' in text
    assert text.startswith(FINDINGS_PREFIX)


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ValueError, match="family in .*qwen2_5_vl.*, got 'llava'"):
        find_family("llava")


def test_a_server_s_calls_are_written_out_as_the_family_writes_them() -> None:
    endpoint = pytest.importorskip("cac_reward.judges.endpoint", reason="serve is not installed")

    def written(arguments: str) -> str:
        call = SimpleNamespace(function=SimpleNamespace(name="inspect", arguments=arguments))
        return endpoint.message_text(SimpleNamespace(content=None, tool_calls=[call]), "xml")

    call = written('{"windows": [[0.25, 1.0]]}')
    assert parse_tool_call(call, 2.0, "xml") == (TimeWindow(0.25, 1.0),)
    for wrong in ('{"windows"', "[]", '{"frames": 3}'):
        with pytest.raises(AnswerError):
            parse_tool_call(written(wrong), 2.0, "xml")


def test_the_family_of_a_server_sets_its_conventions() -> None:
    endpoint = pytest.importorskip("cac_reward.judges.endpoint", reason="serve is not installed")
    options = endpoint.EndpointOptions(probabilities="votes", family="qwen2_5_vl", seed=7)
    judge = endpoint.EndpointJudge("http://127.0.0.1:9/v1", "m", options=options)
    assert (judge.family.box_units, judge.patch_factor) == ("pixels", 28)
    assert judge.decoder == "verdict by 8 sampled votes at temperature 1, seed 7; texts greedy"
    with pytest.raises(ValueError, match="family in .*, got 'llava'"):
        endpoint.EndpointOptions(family="llava")
