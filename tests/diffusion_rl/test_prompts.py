"""Prompts from every kind of file, and what is wrong with each said by file and line."""

import json
import logging
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from diffusion_rl.prompts import read_prompts

PROMPTS = ["a red circle", "caf\u00e9 with\u2028two lines", "the blue square"]


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  caf\u00e9 \r\n", encoding="utf-8")
    assert read_prompts(path) == ["a red circle", "caf\u00e9"]
    path.write_bytes("a\u2028b\nc\x0cd\r\ne\rf".encode())
    assert read_prompts(path) == ["a\u2028b", "c\x0cd", "e", "f"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="prompts must be at least one line of text, got an empty"):
        read_prompts(path)
    path.write_bytes(b"a\nb\ncaf\xe9\n")
    with pytest.raises(ValueError, match="must be UTF-8, got .* byte 0xe9 in line 3; save it as"):
        read_prompts(path)
    path.write_bytes("a\nred".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"got the sign '\\x00' in .*prompts.txt, line 1; save"):
        read_prompts(path)
    with pytest.raises(ValueError, match="prompt_column must be left out for a text file, got cap"):
        read_prompts(path, "caption")


@pytest.mark.parametrize("name", ["prompts.json", "prompts.csv", "prompts.v2"])
def test_a_file_of_another_kind_is_not_read_as_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("id,prompt\n1,a cat\n")
    with pytest.raises(ValueError, match=f"must be .txt, .jsonl, .* got .*{name}; save it as .txt"):
        read_prompts(tmp_path / name)
    (tmp_path / "prompts").write_text("a cat\n")
    assert read_prompts(tmp_path / "prompts") == ["a cat"]


@pytest.mark.parametrize("below", ["", "data"])
def test_a_downloaded_dataset_is_read_part_by_part(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (tmp_path / "README.md").write_text("a dataset")
    for part, texts in enumerate([PROMPTS[:2], PROMPTS[2:]]):
        rows = pyarrow.table({"prompt": texts})
        parquet.write_table(rows, folder / f"train-0000{part}-of-00002.parquet")
    assert read_prompts(tmp_path) == PROMPTS
    with pytest.raises(ValueError, match="must have 'caption', got prompt in .*train-00000-of"):
        read_prompts(tmp_path, "caption")
    parquet.write_table(rows, folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="must be one split .* with test, train; name a file of"):
        read_prompts(tmp_path)
    assert read_prompts(folder / "test-00000-of-00001.parquet") == PROMPTS[2:]


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="prompts must be an existing text, .jsonl or .par"):
        read_prompts(tmp_path / "nothing.txt")


@pytest.mark.parametrize("column", ["prompt", "caption"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, column: str) -> None:
    rows = [{"weight": 2, column: text} for text in PROMPTS]
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "folder")
    dataset.to_parquet(tmp_path / "rows.parquet")
    table = pyarrow.table({column: pyarrow.array(PROMPTS).dictionary_encode()})
    parquet.write_table(table, tmp_path / "coded.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("folder", "rows.parquet", "coded.parquet", "rows.jsonl"):
        assert read_prompts(tmp_path / name, column) == PROMPTS, name


def test_blank_lines_between_json_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": " a "}\r\n\r\n{"prompt": "b"}')
    assert read_prompts(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9"}', "must be UTF-8, got .*rows.jsonl with byte 0xe9 in line 3"),
        (b'{"prompt": ', 'must be a JSON object a line, got {"prompt": in .*rows.jsonl, line 3: '),
        (b'["a"]', "must be a JSON object a line, got a list in .*rows.jsonl, line 3"),
        (b"[" * 100_000, r"must be a JSON object a line, got \[\[.* in .*rows.jsonl, line 3"),
        (
            b'{"text": "a", "id": 1}',
            "must have 'prompt', got text, id in .*rows.jsonl, line 3; name another with prompt_c",
        ),
        (b"{}", "must have 'prompt', got nothing in .*rows.jsonl, line 3"),
        (b'{"prompt": ""}', "must not be empty, got '' in .*rows.jsonl, line 3"),
        (b'{"prompt": " \\t"}', r"must not be empty, got ' \\t' in .*rows.jsonl, line 3"),
        (b'{"prompt": null}', "must be texts, got None in .*rows.jsonl, line 3"),
        (b'{"prompt": ["a"]}', r"must be texts, got \['a'\] in .*rows.jsonl, line 3"),
        (b'{"prompt": "\\ud800"}', r"must be text, got the sign '\\ud800' in .*jsonl, line 3"),
        (b'{"prompt": "a\\u0000"}', r"must be text, got the sign '\\x00' in .*jsonl, line 3"),
    ],
)
def test_one_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = [b'{"prompt": "a"}', b"", b'{"prompt": "b"}']
    path.write_bytes(b"\n".join(good))
    assert read_prompts(path) == ["a", "b"]
    path.write_bytes(b"\n".join([*good[:2], line, good[2]]))
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_a_bad_row_of_a_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for column, bad in (("prompt", None), ("number", 3)):
        table = pyarrow.table({column: [*([bad] if bad else ["a", "b"]), bad]})
        parquet.write_table(table, path)
        row = 1 if bad else 3
        with pytest.raises(ValueError, match=f"must be texts, got {bad} in .*parquet, row {row}"):
            read_prompts(path, column)
    with pytest.raises(ValueError, match="must have 'prompt', got number in .*rows.parquet; name"):
        read_prompts(path)
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match="prompts must be at least one line of text"):
        read_prompts(path)
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="must be readable parquet, got .*rows.parquet: "):
        read_prompts(path)


def test_a_folder_must_be_one_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder written by Dataset.save_to_disk or one"):
        read_prompts(tmp_path)
    split = Dataset.from_dict({"prompt": ["a", "b"], "id": [1, 2]})
    DatasetDict(train=split, test=split).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="one split .*both with test, train; name .*both/test"):
        read_prompts(tmp_path / "both")
    folder = tmp_path / "both" / "train"
    assert read_prompts(folder) == ["a", "b"]
    with pytest.raises(ValueError, match="must have 'caption', got prompt, id in .*train; name an"):
        read_prompts(folder, "caption")
    with pytest.raises(ValueError, match="must be texts, got 1 in .*train, row 1"):
        read_prompts(folder, "id")
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a readable dataset, got .*train: "):
        read_prompts(folder)


def test_repeats_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\na\nc\nb\na\n")
    with caplog.at_level(logging.WARNING, logger="diffusion_rl"):
        assert read_prompts(path) == ["a", "b", "a", "c", "b", "a"]
    (record,) = caplog.records
    assert "3 of the 6 prompts in" in record.getMessage()
    assert "repeat another, 'a' 3 times" in record.getMessage()
    caplog.clear()
    path.write_text("a\nb\n")
    read_prompts(path)
    assert not caplog.records
