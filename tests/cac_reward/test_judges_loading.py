"""From a folder or hub id to a judge: shared weights, settings, and every way it can fail."""

import gc
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cac_reward import CaCScorer
from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
from cac_reward.judges.attention import check_attention, register_xformers, xformers_attention
from cac_reward.judges.families import FAMILIES
from cac_reward.judges.loading import LoadOptions
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import INSPECT_TOOL, Message, scan_message
from tests.tiny_judge import build_tiny_judge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_judge(tmp_path / "judge")


def conversation(num_frames: int) -> tuple[Message, ...]:
    times = [index / 8 for index in range(num_frames)]
    return scan_message(torch.rand(num_frames, 3, 16, 24), times, "brief")


def test_the_same_files_are_loaded_once(folder: Path) -> None:
    judge = LocalJudge.from_pretrained(folder)
    assert LocalJudge.from_pretrained(str(folder)) is judge
    assert LocalJudge.from_pretrained(folder, dtype="bfloat16") is not judge
    build_tiny_judge(folder, seed=1)
    retrained = LocalJudge.from_pretrained(folder)
    clip = conversation(2)
    old = judge.choice_log_probs([clip], choices=("Yes", "No"))
    new = retrained.choice_log_probs([clip], choices=("Yes", "No"))
    assert not torch.equal(old, new)


def test_reports_name_judge_and_revision(folder: Path) -> None:
    judge = LocalJudge.from_pretrained(folder)
    assert judge.name == str(folder)
    model, processor = judge._reader.model, judge._reader.processor
    hub = LocalJudge(model, processor, judge_id="Qwen/Qwen3-VL-4B", revision="abc")
    assert hub.name == "Qwen/Qwen3-VL-4B@abc"


def test_settings_come_with_the_folder(folder: Path) -> None:
    plain = LocalJudge.from_pretrained(folder)
    assert plain.settings == JudgeSettings()
    assert plain.tools == [INSPECT_TOOL]
    assert plain.domain_note is None
    JudgeSettings(wording="brief", domain="toy_world").save(folder)
    trained = LocalJudge.from_pretrained(folder)
    assert trained.settings.wording == "brief"
    assert trained.tools == []
    assert "'toy_world' only; on other footage its verdict means nothing" in trained.domain_note


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_roughly(folder: Path, dtype: str) -> None:
    clips = [conversation(2), conversation(3)]
    exact = LocalJudge.from_pretrained(folder).choice_log_probs(clips, choices=("Yes", "No"))
    half = LocalJudge.from_pretrained(folder, dtype=dtype)
    assert half._reader.model.dtype == getattr(torch, dtype)
    found = half.choice_log_probs(clips, choices=("Yes", "No"))
    # bfloat16 carries 8 bits: log-probabilities near -6 are rounded to 0.03 in the logits.
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-4B-Instruct", "no/such folder", "missing"])
def test_a_judge_that_cannot_be_fetched_names_the_way_out(name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        LocalJudge.from_pretrained(name)
    for part in (repr(name), str(constants.HF_HUB_CACHE), "hf download", "--judge FOLDER"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["/nonexistent", "./nonexistent", "../nonexistent", "~/none"])
def test_a_path_without_a_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="judge must be an existing folder") as caught:
        LocalJudge.from_pretrained(name)
    assert repr(name) in str(caught.value)
    assert "hf download" not in str(caught.value)


def test_a_folder_must_hold_a_judge(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="with a config.json, or with a LoRA adapter's .*, got"
    ):
        LocalJudge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision must be None for a folder, got 'main'"):
        LocalJudge.from_pretrained(folder, revision="main")
    with pytest.raises(ValueError, match="dtype must be one of .*float32.*, got 'float8'"):
        LocalJudge.from_pretrained(folder, dtype="float8")


def test_other_families_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="family in .*qwen3_vl.*, got 'qwen2_vl'"):
        LocalJudge.from_pretrained(folder)


def test_half_written_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    missing = shutil.copytree(folder, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    for path in (cut, missing):
        with pytest.raises(ValueError, match=f"must be a complete checkpoint, got {path}"):
            LocalJudge.from_pretrained(path)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.visual.pos_embed.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"complete checkpoint, got .* without '{name}'"):
        LocalJudge.from_pretrained(folder)


BRIEF = JudgeSettings(
    wording="brief",
    scan=ScanSettings(fps=8.0, max_frames=16, pixels=1024),
    inspect=InspectSettings(fps=8.0, max_frames=12, pixels=2304),
)


def weigh(judge: LocalJudge) -> torch.Tensor:
    torch.manual_seed(3)
    clips = [conversation(2), conversation(3)]
    return judge.choice_log_probs(clips, choices=("Yes", "No", "Verdict"))


def save_adapter(folder: Path, to: Path, scale: float) -> Path:
    """A LoRA adapter with weights that matter, saved by peft."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(to)
    return to


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    return save_adapter(folder, tmp_path / "adapter", scale=1.0)


def test_a_lora_judge_loads_on_the_base_that_it_names(folder: Path, adapter: Path) -> None:
    BRIEF.save(folder)
    judge = LocalJudge.from_pretrained(adapter)
    merged = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(folder), adapter
    ).merge_and_unload()
    processor = judge._reader.processor
    expected = weigh(LocalJudge(merged.eval(), processor, judge_id="merged"))
    found = weigh(judge)
    torch.testing.assert_close(found, expected)
    base = LocalJudge.from_pretrained(folder)
    assert (weigh(base) - found).abs().min() > 1e-3, "the adapter moves every number"
    assert judge.name == f"{adapter} on {folder}"
    assert judge.settings == BRIEF, "the base's, where the adapter has none"
    assert judge.fingerprint != base.fingerprint
    assert not any(one.requires_grad for one in judge._reader.model.parameters())
    assert LocalJudge.from_pretrained(adapter) is judge
    JudgeSettings(wording="brief").save(adapter)
    assert LocalJudge.from_pretrained(adapter).settings == JudgeSettings(wording="brief")


def test_the_base_may_be_named(folder: Path, adapter: Path, tmp_path: Path) -> None:
    expected = weigh(LocalJudge.from_pretrained(adapter))
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=f"judge must be an existing folder .*, got '{folder}'"
    ):
        LocalJudge.from_pretrained(adapter)
    torch.testing.assert_close(weigh(LocalJudge.from_pretrained(adapter, base=moved)), expected)
    with pytest.raises(ValueError, match="base must be None for a whole checkpoint, got"):
        LocalJudge.from_pretrained(moved, base=moved)
    with pytest.raises(FileNotFoundError, match="base must be a folder with a config.json, got"):
        LocalJudge.from_pretrained(adapter, base=adapter)


def test_an_adapter_must_fit_its_base(adapter: Path, tmp_path: Path) -> None:
    other = build_tiny_judge(tmp_path / "wide", hidden_size=64, heads=4)
    deep = build_tiny_judge(tmp_path / "deep", layers=3)
    with pytest.raises(ValueError, match="(?s)adapter must fit its base, got .*size mismatch"):
        LocalJudge.from_pretrained(adapter, base=other)
    with pytest.raises(ValueError, match="weights that only one of them has, such as .*layers.2"):
        LocalJudge.from_pretrained(adapter, base=deep)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter with adapter_model.safetensors, got .* pickled"):
        LocalJudge.from_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="base must be given, since .* names none"):
        LocalJudge.from_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json must be JSON in UTF-8, got"):
        LocalJudge.from_pretrained(adapter)


def test_the_attention_that_runs_is_the_one_asked_for(folder: Path) -> None:
    judges = [LocalJudge.from_pretrained(folder, attention=name) for name in ("sdpa", "eager")]
    assert [judge.attention for judge in judges] == ["sdpa", "eager"]
    torch.testing.assert_close(weigh(judges[0]), weigh(judges[1]))
    judges[0]._reader.model.model.visual.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="'sdpa' was asked for, but .*visual.* runs on 'eager'"):
        check_attention(judges[0]._reader.model, "sdpa")


@pytest.mark.parametrize("name", ["flash_attention_2", "xformers"])
def test_an_attention_that_cannot_run_is_an_error(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=f"'{name}' needs .* pip install .*attention='sdpa'"):
        LocalJudge.from_pretrained(folder, attention=name, device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(ValueError, match=f"'sdpa' or 'eager' on the device 'cpu', got '{name}'"):
        LocalJudge.from_pretrained(folder, attention=name)


def test_flash_attention_knows_no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(ValueError, match="dtype must be 'bfloat16' or 'float16' for attention"):
        LoadOptions(attention="flash_attention_2", device="cuda")
    with pytest.raises(ValueError, match="attention must be one of .*, got 'flash'"):
        LoadOptions(attention="flash")


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """xformers.ops as its documentation has it, by plain matrix products."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: object = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert query.ndim == key.ndim == 4
        assert query.shape[2:] == key.shape[2:] == value.shape[2:], "as many heads of each"
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        logits = query @ key.mT * (scale or query.shape[-1] ** -0.5)
        if isinstance(attn_bias, torch.Tensor):
            assert attn_bias.shape == logits.shape
            assert attn_bias.stride(-2) % 8 == 0, "rows begin at multiples of 8 elements"
            logits = logits + attn_bias
        elif attn_bias is not None:
            later = torch.ones(logits.shape[-2:]).triu(1 + key.shape[-2] - query.shape[-2])
            logits = logits.masked_fill(later.bool(), -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    bias = SimpleNamespace(LowerTriangularFromBottomRightMask=lambda: "lower right triangle")
    ops.memory_efficient_attention, ops.fmha = attend, SimpleNamespace(attn_bias=bias)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


@pytest.mark.parametrize("family", FAMILIES)
def test_xformers_is_called_as_its_documentation_says(
    tmp_path: Path, family: str, xformers: ModuleType
) -> None:
    register_xformers()
    judge = LocalJudge.from_pretrained(
        build_tiny_judge(tmp_path, family=family, patch_size=4, merge_size=2)
    )
    expected = weigh(judge)
    judge._reader.model.set_attn_implementation("xformers")
    check_attention(judge._reader.model, "xformers")
    torch.testing.assert_close(weigh(judge), expected)
    with judge.remembering():
        weigh(judge)
        torch.testing.assert_close(weigh(judge), expected)
    xformers.memory_efficient_attention = None
    with pytest.raises(TypeError):
        weigh(judge)


def test_xformers_that_does_not_load_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="needs kernels that load with torch .*'sdpa'"):
        register_xformers()
    attend = partial(xformers_attention, torch.nn.Module(), *[torch.rand(1, 2, 3, 8)] * 3, None)
    monkeypatch.setitem(sys.modules, "xformers.ops", ModuleType("xformers.ops"))
    with pytest.raises(ValueError, match="dropout must be 0 with attention 'xformers', got 0.1"):
        attend(dropout=0.1)


def test_quantization_without_its_package_names_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="quantization must be None or one of .*, got '2bit'"):
        LocalJudge.from_pretrained(folder, quantization="2bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ImportError, match=r"'4bit' needs bitsandbytes; .*cac-reward\[quantization\]"
    ):
        LocalJudge.from_pretrained(folder, quantization="4bit")


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_judge_agrees_roughly(tmp_path: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = build_tiny_judge(tmp_path / "wide", hidden_size=64, heads=4)
    adapter = save_adapter(folder, tmp_path / "adapter", scale=0.05)
    judge = LocalJudge.from_pretrained(folder, quantization=quantization)
    kinds = {type(module).__name__ for module in judge._reader.model.modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[quantization] in kinds
    exact = weigh(LocalJudge.from_pretrained(folder))
    assert not torch.equal(weigh(judge), exact)
    assert (weigh(judge) - exact).abs().max() < 0.2
    adapted = LocalJudge.from_pretrained(adapter, quantization=quantization)
    exact = weigh(LocalJudge.from_pretrained(adapter))
    assert (weigh(adapted) - exact).abs().max() < 0.2
    assert not torch.equal(weigh(adapted), weigh(judge))


def test_a_scorer_may_see_the_clip_otherwise_than_its_judge_was_trained(folder: Path) -> None:
    BRIEF.save(folder)
    plain = CaCScorer.from_pretrained(folder)
    other = CaCScorer.from_pretrained(
        folder, scan={"max_frames": 4}, inspect=InspectSettings(fps=2.0)
    )
    assert plain.judge.settings == BRIEF
    assert other.judge.settings.scan == ScanSettings(fps=8.0, max_frames=4, pixels=1024)
    assert other.judge.settings.inspect == InspectSettings(fps=2.0)
    assert other.judge._reader is plain.judge._reader, "weights are shared"
    videos = torch.rand(1, 13, 3, 32, 32)
    assert len(other(videos, ["x"], fps=8.0)["reports"][0].scan_frames) == 4
    assert len(plain(videos, ["x"], fps=8.0)["reports"][0].scan_frames) == 13
    for wrong, message in (
        ({"frames": 4}, "scan must have no key but .*, got 'frames'"),
        ({"max_frames": 1}, "scan.max_frames must be an integer of at least 2, got 1"),
        (InspectSettings(), "scan must be ScanSettings or an object, got InspectSettings"),
        (4, "scan must be ScanSettings or an object, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            CaCScorer.from_pretrained(folder, scan=wrong)


def test_a_judge_asked_otherwise_keeps_its_weights_findable(folder: Path) -> None:
    asked = LocalJudge.from_pretrained(folder).asked_as(settings=BRIEF)
    gc.collect()
    assert LocalJudge.from_pretrained(folder)._reader is asked._reader
