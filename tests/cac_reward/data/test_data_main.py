"""The commands below `cac-reward annotate`, from the command line's own entry."""

import json
import shlex
from pathlib import Path

import pytest

from cac_reward.__main__ import main
from cac_reward.data.__main__ import main as data_main
from cac_reward.data.importers.vau_bench import COLUMNS
from cac_reward.data.storage import read_annotations
from cac_reward.exporting import export_clips
from cac_reward.exports.base import LabelledClip

UCF = "Abuse028_x264.mp4 Abuse 165 240 -1 -1\nArson011_x264.mp4 Arson 150 42x -1 -1\n"


def test_import_check_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(UCF)
    out = tmp_path / "ucf.jsonl"
    command = ["annotate", "import", "ucf_crime", str(tmp_path / "t.txt"), "--output", str(out)]
    assert main([*command, "--fps", "30"]) == 3
    said = capsys.readouterr()
    assert said.out == f"1 clips (1 anomalous, 1 with windows): {out}\n"
    assert said.err.splitlines() == [
        f"left out: {tmp_path}/t.txt: line 2, column 4 (character 29): frame must be a number from "
        "0 on, got '42x'",
        "1 left out, named above",
    ]
    assert main(["annotate", "check", str(out), "--no-files"]) == 0
    assert "1 clips" in capsys.readouterr().out
    assert main(["annotate", "check", str(out), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["counts"], report["has_faults"]) == ({"file": 1}, True)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "Abuse028_x264.mp4").write_bytes(b"video")
    assert main(["annotate", "check", str(out), "--videos", str(tmp_path / "v")]) == 0

    for name in ("a.parquet", "b.jsonl"):
        convert = ["annotate", "convert", str(out), "--output", str(tmp_path / name)]
        assert main(convert) == 0
        assert list(read_annotations(tmp_path / name)) == list(read_annotations(out))
    (tmp_path / "s").mkdir()
    pack = ["convert", str(out), "--output", str(tmp_path / "s" / "c.tar"), "--max-clips", "5"]
    assert data_main([*pack, "--videos", str(tmp_path / "v")]) == 0
    assert list(read_annotations(tmp_path / "s")) == list(read_annotations(out))
    capsys.readouterr()
    # A shard carries its videos, so none are looked for beside it.
    assert main(["annotate", "check", str(tmp_path / "s")]) == 0
    assert "videos were not looked for" in capsys.readouterr().out


def test_a_file_without_entries_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "o.jsonl"
    table.write_text(",".join(COLUMNS) + "\n")
    assert main(["annotate", "import", "vau_bench", str(table), "--output", str(out)]) == 3
    said = capsys.readouterr()
    assert said.out == f"0 clips: {out}\n"
    assert said.err.splitlines() == [
        f"left out: {table}: file must hold at least one entry, got none",
        "1 left out, named above",
    ]


def test_the_command_that_a_refusal_names_exists_and_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = LabelledClip(path="a.mp4", width=64, height=48, fps=8.0, num_frames=16)
    (tmp_path / "my clips").mkdir()
    file = tmp_path / "my clips" / "f.jsonl"
    export_clips([old], "findings", file)
    assert main(["annotate", "check", str(file), "--no-files"]) == 2
    said = capsys.readouterr().err
    assert "schema_version must be 1, got 0; convert it with: cac-reward annotate convert" in said
    command = said.strip().rpartition("cac-reward ")[2]
    assert main(shlex.split(command)) == 0
    assert main(["annotate", "check", str(file.with_name("f.v1.jsonl")), "--no-files"]) == 0


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("import vau_bench {0}/gone.csv --output {0}/a.jsonl", "file must exist to be imported"),
        ("import vau_bench {0}/t.txt --output {0}/no/a.jsonl", "folder of .* must exist; make it"),
        ("import vau_bench {0}/t.txt --output {0}/a.csv", "output must end in one of"),
        ("import vau_bench {0}/t.txt --output {0}/a.jsonl", "line 1 must have the column"),
        ("import uca {0}/t.txt --output {0}/a.jsonl --path x", "path must be left out for uca"),
        ("import vau_bench {0}/t.txt --output {0}/a.jsonl --videos {0}/x", "an existing folder"),
        (
            "import ucf_crime {0}/t.txt --output {0}/a.jsonl --fps -3",
            "fps must be above 0, got -3.0; leave it out",
        ),
        (
            "import ucf_crime {0}/t.txt --output {0}/a.jsonl --fps nan",
            "fps must be finite, got nan",
        ),
        ("check {0}/gone.jsonl", "annotations must be an existing file or folder"),
        ("check {0}/t.jsonl --show -1", "show must be at least 0, got -1"),
        ("convert {0}/t.jsonl --output {0}/t.jsonl", "output must be another file"),
        ("convert {0}/t.jsonl --output {0}/u.jsonl --max-clips 3", "max_clips must be left out"),
        (
            "convert {0}/t.jsonl --output {0}/u.jsonl --videos {0}",
            "videos must be packed into .tar",
        ),
    ],
)
def test_wrong_use_is_said_in_a_line(
    command: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(UCF)
    (tmp_path / "t.jsonl").write_text('{"schema_version": 1, "path": "a"}\n')
    before = sorted(tmp_path.iterdir())
    assert main(["annotate", *command.format(tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    with pytest.raises(ValueError, match=match):
        raise ValueError(said)
    assert sorted(tmp_path.iterdir()) == before
