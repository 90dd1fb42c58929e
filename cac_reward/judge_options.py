"""Which judge, where, and how it is asked: the options that `score` and `serve` share.

Plain values only, so that the server can hand them to the process that holds the model; nothing
heavy is imported before `JudgeOptions.load`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cac_reward.report import MODES

if TYPE_CHECKING:
    from cac_reward.scorer import CaCScorer

SCHEMES = ("http://", "https://")
KEY_VARIABLE = "OPENAI_API_KEY"
"""Where the key of an endpoint comes from; never an option, which others on the machine see."""
_HERE = ("device", "dtype", "attention", "revision", "base", "quantization")
"""What a server of the judge decides itself."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge in plain values; None leaves a value to its default."""

    judge: str
    """Folder or hub id; with `endpoint`, the server's name of the model."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."""
    family: str | None = None
    """Of an endpoint's model, which cannot be asked; a judge here says it in its config."""
    patch_factor: int | None = None
    """Of an endpoint's model: sides of frames are multiples of this; None for the family's."""
    settings: str | None = None
    """Folder whose cac_judge.json says how an endpoint's judge was trained to be asked; a judge
    here has it beside its weights."""
    revision: str | None = None
    """Branch, tag or commit of the hub id."""
    base: str | None = None
    """Folder or hub id of an adapter's base."""
    device: str | None = None
    """'cpu' (the default), 'cuda', 'cuda:1', ..."""
    dtype: str | None = None
    """'float32' (the default), 'bfloat16' or 'float16'."""
    attention: str | None = None
    """'sdpa' (the default), 'eager', 'flash_attention_2' or 'xformers'."""
    quantization: str | None = None
    """'8bit' or '4bit'."""
    mode: str = MODES[0]
    """One of `MODES`."""
    num_votes: int | None = None
    """Sampled answers whose consensus is the verdict, at least 2."""
    seed: int | None = None
    """Of the votes."""
    scan: Mapping[str, float] | None = None
    """What turn 1 sees, the names of `ScanSettings` that should change."""
    inspect: Mapping[str, float] | None = None
    """What turn 2 sees, the names of `InspectSettings` that should change."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.judge.startswith(SCHEMES):
            raise ValueError(
                f"judge must be a folder, a hub id or a model's name, got {self.judge!r}; give the "
                "address as endpoint, and the server's name of the model as judge"
            )
        if self.endpoint is None:
            elsewhere = ("family", "patch_factor", "settings")
            self._refuse(elsewhere, "without endpoint; the judge's own files say it")
            if self.num_votes is None:
                self._refuse(("seed",), "without num_votes; nothing else is sampled")
            return
        if not self.endpoint.startswith(SCHEMES):
            raise ValueError(f"endpoint must begin with one of {SCHEMES}, got {self.endpoint!r}")
        self._refuse(_HERE, "with endpoint; the server is started with its own")

    def load(self, *, cache: str | Path | None = None) -> CaCScorer:
        """The scorer of this judge.

        Args:
            cache: file in which reports are kept and found again.

        Raises:
            ValueError, FileNotFoundError, ImportError: As `CaCScorer.from_pretrained` says.
            JudgeUnreachableError: The endpoint does not answer, or refuses key or model.
        """
        from cac_reward.scorer import CaCScorer

        if self.endpoint is not None:
            return self._ask_endpoint(self.endpoint, cache)
        given = {
            name: value for name in (*_HERE, "seed") if (value := getattr(self, name)) is not None
        }
        return CaCScorer.from_pretrained(
            self.judge,
            mode=self.mode,
            scan=self.scan,
            inspect=self.inspect,
            num_votes=self.num_votes,
            cache=cache,
            **given,
        )

    def _ask_endpoint(self, endpoint: str, cache: str | Path | None) -> CaCScorer:
        if importlib.util.find_spec("openai") is None:
            raise ImportError(
                "endpoint needs openai; install it with: pip install 'cac-reward[serve]'"
            )
        from cac_reward.frames import JUDGE_FILE, JudgeSettings
        from cac_reward.judges.endpoint import EndpointOptions
        from cac_reward.scorer import CaCScorer

        asked: dict[str, object] = {"seed": self.seed or 0}
        if self.num_votes is not None:
            asked |= {"probabilities": "votes", "num_votes": self.num_votes}
        for name in ("family", "patch_factor"):
            if getattr(self, name) is not None:
                asked[name] = getattr(self, name)
        settings = JudgeSettings()
        if self.settings is not None:
            if not (Path(self.settings) / JUDGE_FILE).is_file():
                raise ValueError(
                    f"settings must be a folder with a {JUDGE_FILE}, got {self.settings}"
                )
            settings = JudgeSettings.load(self.settings)
        return CaCScorer.from_endpoint(
            endpoint,
            self.judge,
            options=EndpointOptions(**asked),  # type: ignore[arg-type]
            settings=settings.seen_as(self.scan, self.inspect),
            mode=self.mode,
            cache=cache,
        )

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """Refuse what would stay without effect."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be left out {why}, got {getattr(self, name)!r}")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one argument for each field of `JudgeOptions` but `judge`."""
    options = parser.add_argument_group("judge")
    options.add_argument(
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible server that holds the judge, as in http://127.0.0.1:8000/v1; "
        f"--judge is its name of the model, and {KEY_VARIABLE} its key",
    )
    options.add_argument("--family", help="of an endpoint's model, such as qwen2_5_vl")
    options.add_argument(
        "--patch-factor", type=int, metavar="N", help="sides of an endpoint's frames: multiples"
    )
    options.add_argument(
        "--settings", metavar="FOLDER", help="with the cac_judge.json of an endpoint's judge"
    )
    options.add_argument("--revision", help="branch, tag or commit of the hub id")
    options.add_argument("--base", metavar="FOLDER_OR_ID", help="base of a LoRA judge")
    options.add_argument("--device", help="cpu (default), cuda, cuda:1, ...")
    options.add_argument("--dtype", help="float32 (default), bfloat16 or float16")
    options.add_argument("--attention", help="sdpa (default), eager, flash_attention_2 or xformers")
    options.add_argument("--quantization", help="8bit or 4bit, through bitsandbytes")
    options.add_argument(
        "--mode", choices=MODES, default=MODES[0], help="full writes its findings (default)"
    )
    options.add_argument(
        "--num-votes", type=int, metavar="N", help="verdict by N sampled answers, at least 2"
    )
    options.add_argument("--seed", type=int, metavar="N", help="of the votes (default: 0)")
    for name, turn in (("scan", "1"), ("inspect", "2")):
        options.add_argument(
            f"--{name}",
            type=_assignment,
            nargs="+",
            metavar="KEY=VALUE",
            help=f"what turn {turn} sees, such as max_frames=32 pixels=65536",
        )


def judge_options(options: argparse.Namespace) -> JudgeOptions:
    """What was given on the command line.

    Raises:
        ValueError: Options do not go together.
    """
    given = {one.name: getattr(options, one.name) for one in fields(JudgeOptions)}
    for name in ("scan", "inspect"):
        given[name] = None if given[name] is None else dict(given[name])
    return JudgeOptions(**given)


def given_judge_options(options: argparse.Namespace) -> list[str]:
    """Names of the judge's options that are not at their default, `judge` itself left out."""
    defaults = {one.name: one.default for one in fields(JudgeOptions) if one.name != "judge"}
    return [name for name, default in defaults.items() if getattr(options, name) != default]


def _assignment(text: str) -> tuple[str, float]:
    """The name and the number of KEY=VALUE."""
    name, _, value = text.partition("=")
    try:
        number = json.loads(value)
    except ValueError:
        number = None
    if not name or isinstance(number, bool) or not isinstance(number, int | float):
        raise argparse.ArgumentTypeError(f"must be KEY=NUMBER, got {text!r}")
    return name, number
