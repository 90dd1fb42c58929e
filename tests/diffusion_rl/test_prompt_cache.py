"""Embeddings from disk are the encoder's to the last bit, and nothing wrong is ever read."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_rl.generators import prompt_cache
from diffusion_rl.generators.base import PromptEmbeddings
from diffusion_rl.generators.hunyuan15 import HunyuanVideo15Generator
from diffusion_rl.generators.pipeline import AbstractPipelineGenerator
from diffusion_rl.generators.prompt_cache import PromptCache, checksum, fingerprint
from diffusion_rl.generators.wan import WanGenerator
from tests.diffusion_rl.test_execution import TINY
from tests.diffusion_rl.test_execution import build as build_family
from tests.family_checks import PROMPTS, sample
from tests.tiny_wan import SIZE, build_tiny_wan, save_tiny_wan

LONG_AGO = 1_000_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("cached") / "pipeline")


def load(folder: Path, cache: Path | None, **more: Any) -> WanGenerator:
    return WanGenerator.from_pretrained(folder, prompt_cache=cache, **{**SIZE, **more})


def assert_same(found: PromptEmbeddings, expected: PromptEmbeddings) -> None:
    assert torch.equal(found.conditional, expected.conditional)
    assert torch.equal(found.unconditional, expected.unconditional)
    for own, other in (
        (found.conditional_extras, expected.conditional_extras),
        (found.unconditional_extras, expected.unconditional_extras),
    ):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("name", TINY)
def test_a_second_start_reads_the_same_and_loads_no_encoder(name: str, tmp_path: Path) -> None:
    built = build_family(name)
    built.pipeline.save_pretrained(tmp_path / "pipeline")
    names = ("height", "width", "num_frames", "fps", "max_sequence_length")
    size = {one: getattr(built, one) for one in names}
    expected = built.encode_prompts(PROMPTS)
    options = {**size, "prompt_cache": tmp_path / "cache"}
    first = type(built).from_pretrained(tmp_path / "pipeline", **options)
    assert all(getattr(first.pipeline, part) is None for part in first.text_encoders)
    assert_same(first.encode_prompts(PROMPTS), expected)
    assert all(getattr(first.pipeline, part) is not None for part in first.text_encoders)
    assert len(entries(tmp_path / "cache")) == 3

    second = type(built).from_pretrained(tmp_path / "pipeline", **options)
    assert_same(second.encode_prompts(PROMPTS), expected)
    assert all(getattr(second.pipeline, part) is None for part in second.text_encoders)
    assert torch.equal(sample(second, 3.0), sample(built, 3.0))


def test_only_what_is_missing_needs_the_encoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, tmp_path).encode_prompts(PROMPTS)
    asked: list[str] = []
    own = AbstractPipelineGenerator.encode_one
    monkeypatch.setattr(
        AbstractPipelineGenerator,
        "encode_one",
        lambda self, prompt: asked.append(prompt) or own(self, prompt),
    )
    generator = load(folder, tmp_path)
    both = generator.encode_prompts([PROMPTS[0], "a green circle"])
    assert asked == ["a green circle"]
    fresh = load(folder, None).encode_prompts([PROMPTS[0], "a green circle"])
    assert_same(both, fresh)
    assert not generator.pipeline.text_encoder.training
    assert not any(part.requires_grad for part in generator.pipeline.text_encoder.parameters())
    generator.release_text_encoder()
    assert_same(generator.encode_prompts([PROMPTS[0], "a green circle"]), fresh)
    with pytest.raises(RuntimeError, match="encode_prompts must be called before"):
        generator.encode_prompts(["never seen"])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: {"max_sequence_length": 10},
        lambda folder: {"dtype": "bfloat16"},
        lambda folder: change_weights(folder) or {},
        lambda folder: (folder / "tokenizer" / "new.json").write_text("{}") and {},
    ],
    ids=["length", "type", "weights", "tokenizer"],
)
def test_whatever_changes_an_embedding_makes_another_entry(
    change: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    folder, cache = save_tiny_wan(tmp_path / "pipeline"), tmp_path / "cache"
    before = load(folder, cache).encode_prompts(PROMPTS)
    old = entries(cache)
    more = change(folder)
    generator = load(folder, cache, **more)
    after = generator.encode_prompts(PROMPTS)
    assert len(entries(cache)) == 2 * len(old)
    assert_same(after, load(folder, None, **more).encode_prompts(PROMPTS))
    assert_same(load(save_again(folder), cache).encode_prompts(PROMPTS), before)


def change_weights(folder: Path) -> None:
    """Another text encoder in files of the same names and sizes."""
    build_tiny_wan(seed=1).text_encoder.save_pretrained(folder / "text_encoder")


def save_again(folder: Path) -> Path:
    """The same pipeline elsewhere: what counts is content, not place."""
    return save_tiny_wan(folder.with_name("elsewhere"))


def test_a_damaged_entry_is_computed_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(folder, tmp_path).encode_prompts(PROMPTS)
    path = load(folder, tmp_path).prompt_cache.path(PROMPTS[0])
    whole = path.read_bytes()

    def cut() -> None:
        path.write_bytes(whole[:-7])

    def flip() -> None:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def empty() -> None:
        path.write_bytes(b"")

    def strip() -> None:
        save_file(load_file(path), path)

    for damage, message in (
        (cut, "cannot be read and is computed again"),
        (empty, "cannot be read and is computed again"),
        (flip, "is damaged and is computed again"),
        (strip, "is damaged and is computed again"),
    ):
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffusion_rl"):
            assert_same(load(folder, tmp_path).encode_prompts(PROMPTS), expected)
        (record,) = caplog.records
        assert message in record.getMessage()
        assert str(path) in record.getMessage()
        assert load(folder, tmp_path).prompt_cache.read(PROMPTS[0]) is not None
    assert not list(tmp_path.rglob("*.part"))


def test_extras_and_types_are_kept(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, {"a": 1})
    assert cache.read("x") is None
    entry = (
        torch.randn(1, 3, 2).bfloat16(),
        {"mask": torch.tensor([[True, False]]), "count": torch.tensor([[3]])},
    )
    cache.write("x", entry)
    embedding, extras = cache.read("x")
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, entry[0])
    assert extras.keys() == entry[1].keys()
    assert all(torch.equal(extras[name], entry[1][name]) for name in extras)
    assert PromptCache(tmp_path, {"a": 2}).read("x") is None
    assert cache.read("y") is None


def test_the_checksum_sees_names_types_shapes_and_values() -> None:
    tensor = torch.arange(4, dtype=torch.int16)
    others = [
        {"b": tensor},
        {"a": tensor.view(torch.bfloat16)},
        {"a": tensor.reshape(2, 2)},
        {"a": tensor + 1},
        {"a": tensor, "b": tensor},
    ]
    assert len({checksum(one) for one in [{"a": tensor}, *others]}) == 1 + len(others)
    assert checksum({"a": tensor, "b": tensor}) == checksum({"b": tensor, "a": tensor.clone()})


def test_files_are_hashed_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, memory = tmp_path / "text_encoder", tmp_path / "cache"
    part.mkdir()
    for name in ("a", "b"):
        (part / name).write_text(name)
        os.utime(part / name, (LONG_AGO, LONG_AGO))
    read: list[int] = []
    own = prompt_cache.hashlib.file_digest
    monkeypatch.setattr(
        prompt_cache.hashlib, "file_digest", lambda *given: read.append(1) or own(*given)
    )
    first = fingerprint([part], memory)
    assert len(read) == 2
    assert fingerprint([part], memory) == first
    assert len(read) == 2
    (part / "b").write_text("c")
    os.utime(part / "b", (LONG_AGO, LONG_AGO + 1))
    changed = fingerprint([part], memory)
    assert len(read) == 3
    assert changed != first
    (part / "b").write_text("d")
    # Changed just now: not remembered, for it may change again within the clock's tick.
    fingerprint([part], memory)
    fingerprint([part], memory)
    assert len(read) == 5
    for damaged in ("{", "[]", json.dumps([1])):
        (memory / "hashes.json").write_text(damaged)
        (part / "b").write_text("b")
        assert fingerprint([part], memory) == first
    assert fingerprint([tmp_path / "nothing"], memory) != first


def test_hunyuans_two_encoders_count() -> None:
    assert HunyuanVideo15Generator.text_encoders == ("text_encoder", "text_encoder_2")
