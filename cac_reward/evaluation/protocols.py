"""How a public benchmark is measured: which split, what it needs, which measures are its figures.

The files lie inside the package, so that `--protocol NAME` works wherever the package is installed;
a file of one's own is named by its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.plain import read_record, read_sequence, read_string
from cac_reward.report import VERDICTS

FOLDER = Path(__file__).with_name("benchmarks")
NEEDS = {
    "clean": "clean clips",
    "anomalous": "anomalous clips",
    "windows": "clips with annotated windows",
    "pairs": "anomalous clips with a clean one of the same source_video",
}
"""What a protocol may ask of the annotations, in words."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One benchmark."""

    benchmark: str
    """Its name."""
    source: str
    """Where its rules stand."""
    importer: str
    """Of its annotations, a key of `data.importing.IMPORTERS`."""
    split: str
    """Of the clips that are measured."""
    head: tuple[str, ...]
    """Measures that head the table: its figures."""
    needs: tuple[str, ...]
    """What the annotations must hold, keys of `NEEDS`."""
    remedy: str
    """What to do where they do not."""
    rules: tuple[str, ...]
    """How its figures come about here, and where that differs from the published code."""

    def __post_init__(self) -> None:
        for name in ("head", "needs", "rules"):
            listed = read_sequence(name, getattr(self, name))
            object.__setattr__(self, name, tuple(read_string(name, one) for one in listed))
        for one in fields(self):
            if not getattr(self, one.name):
                raise ValueError(f"{one.name} must not be empty")
        unknown = [one for one in self.needs if one not in NEEDS]
        if unknown:
            raise ValueError(f"needs must be among {', '.join(NEEDS)}, got {unknown[0]!r}")

    @classmethod
    def load(cls, name: str) -> Protocol:
        """Read a protocol by its name, or from a YAML file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the name is unknown, or the file is no protocol.
        """
        path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
        if path.parent == FOLDER and name not in known_protocols():
            raise ValueError(
                f"protocol must be one of {', '.join(known_protocols())}, or a .yaml file, "
                f"got {name!r}"
            )
        if not path.is_file():
            raise FileNotFoundError(f"protocol must be an existing file, got {path}")
        names = [one.name for one in fields(cls)]
        try:
            plain: Any = OmegaConf.to_container(OmegaConf.load(path))
            record: Any = read_record("protocol", plain, names)
            for key in ("benchmark", "source", "importer", "split", "remedy"):
                read_string(key, record[key])
            return cls(**record)
        except (ValueError, OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self, clips: Sequence[AnnotatedClip]) -> None:
        """Refuse annotations that do not hold what the benchmark needs.

        Raises:
            ValueError: Naming what is missing, and the remedy.
        """
        clean = {clip.origin for clip in clips if clip.verdict == VERDICTS[0]}
        anomalous = [clip for clip in clips if clip.verdict == VERDICTS[1]]
        held = {
            "clean": bool(clean),
            "anomalous": bool(anomalous),
            "windows": any(clip.findings for clip in anomalous),
            "pairs": any(clip.origin in clean for clip in anomalous),
        }
        missing = [need for need in self.needs if not held[need]]
        if missing:
            raise ValueError(
                f"annotations must hold {NEEDS[missing[0]]} for {self.benchmark}, got none among "
                f"{len(clips)} of split {self.split!r}; {self.remedy}"
            )


def known_protocols() -> list[str]:
    """Names that `Protocol.load` knows."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
