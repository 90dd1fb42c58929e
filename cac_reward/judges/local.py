"""A judge on this machine: transformers' own model and processor, greedy and in batches.

Axes: B conversations of a batch, V vocabulary, N choices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cac_reward.calibration import Calibration
from cac_reward.frames import JudgeSettings
from cac_reward.judges.base import AbstractJudge, Conversation, one_prefix_each
from cac_reward.judges.families import find_family
from cac_reward.judges.loading import fingerprint, load, locate
from cac_reward.judges.reading import BatchReader, ReadBatch

_LOADED: WeakValueDictionary[tuple, LocalJudge] = WeakValueDictionary()


class LocalJudge(AbstractJudge):
    """A transformers vision-language model as a judge.

    Args:
        model: what `AutoModelForImageTextToText` loads, of one of `families.FAMILIES`.
        processor: what `AutoProcessor` loads beside it.
        judge_id: folder or hub id, for the reports.
        revision: commit of the weights where they came from a hub.
        settings: how the judge wants to be asked.
        max_batch_tokens: most tokens read in one forward pass; one conversation may be longer.
        max_memory_bytes: most bytes of key-value cache kept inside `remembering()`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        judge_id: str,
        revision: str | None = None,
        settings: JudgeSettings | None = None,
        max_batch_tokens: int = 8192,
        max_memory_bytes: int = 2**30,
    ) -> None:
        self.family = find_family(model.config.model_type)
        self.judge_id = judge_id
        self.revision = revision
        self.settings = settings or JudgeSettings()
        self._tokenizer = processor.tokenizer
        self._never_written = self._tokenizer.convert_tokens_to_ids(list(self.family.never_written))
        self._stops = _stop_ids(model, self._tokenizer)
        self._reader = BatchReader(
            model,
            processor,
            family=self.family,
            pad_token_id=self._stops[0],
            max_batch_tokens=max_batch_tokens,
            max_memory_bytes=max_memory_bytes,
        )
        self.patch_factor = self._reader.patch_factor
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        revision: str | None = None,
    ) -> LocalJudge:
        """Load a judge, or share the one that is loaded already from the same files.

        Args:
            path_or_hub_id: folder, or id on the hub.
            device: where it runs, for example 'cpu' or 'cuda:0'.
            dtype: 'float32', 'bfloat16' or 'float16'.
            attention: transformers' name of the attention kernel.
            revision: branch, tag or commit on the hub; None for the main branch.

        Raises:
            FileNotFoundError: If the judge is not there and cannot be fetched.
            ValueError: If the files are no complete checkpoint of a known family.
        """
        folder, commit = locate(path_or_hub_id, revision)
        files = tuple(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.iterdir())
            if path.is_file()
        )
        key = (cls, str(path_or_hub_id), folder.resolve(), files, device, dtype, attention)
        judge = _LOADED.get(key)
        if judge is None:
            model, processor = load(folder, device, dtype, attention)
            judge = cls(
                model,
                processor,
                judge_id=str(path_or_hub_id),
                revision=commit,
                settings=JudgeSettings.load(folder),
            )
            judge.fingerprint = fingerprint(folder, dtype, attention)
            judge.calibration = Calibration.load(folder)
            _LOADED[key] = judge
        return judge

    @torch.inference_mode()
    def generate(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[str]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        prefixes = one_prefix_each(prefix, len(conversations))
        answers = list(prefixes)
        with self._lock:
            for rows, read in self._reader.read(conversations, prefixes, tools):
                for row, tokens in zip(rows, self._write(read, max_new_tokens), strict=True):
                    answers[row] += self._tokenizer.decode(tokens, skip_special_tokens=True)
        return answers

    @torch.inference_mode()
    def choice_log_probs(
        self,
        conversations: Sequence[Conversation],
        *,
        choices: Sequence[str],
        prefix: str | Sequence[str] = "",
        tools: Sequence[Mapping[str, object]] = (),
    ) -> Tensor:
        prefixes = one_prefix_each(prefix, len(conversations))
        if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
            raise ValueError(f"choices must be two or more different texts, got {list(choices)}")
        tokens = self._tokenizer(list(choices), add_special_tokens=False)["input_ids"]
        log_probs = torch.empty(len(conversations), len(tokens))
        with self._lock:
            for rows, read in self._reader.read(conversations, prefixes, tools):
                log_probs[rows] = self._weigh(read, [tuple(one) for one in tokens]).cpu()
        return log_probs

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keep what is read until the context ends; calls from other threads wait."""
        with self._lock:
            outer = self._reader.memory
            self._reader.memory = [] if outer is None else outer
            try:
                yield
            finally:
                self._reader.memory = outer

    def _weigh(self, read: ReadBatch, choices: Sequence[tuple[int, ...]]) -> Tensor:
        """[B N] log-probability of each choice; one more pass only where one has several tokens."""
        table: dict[tuple[int, ...], Tensor] = {(): torch.log_softmax(read.logits, dim=-1)}
        for beginning in sorted({choice[:-1] for choice in choices}, key=len, reverse=True):
            if beginning in table:
                continue
            ids = torch.tensor([beginning] * len(read.mask), device=read.mask.device)
            steps = torch.arange(len(beginning), device=read.mask.device)
            logits, _ = self._reader.forward(
                ids,
                torch.cat([read.mask, torch.ones_like(ids)], dim=1),
                (read.next_position[:, None] + steps).expand(3, -1, -1),
                read.fork_cache(),
                keep=len(beginning),
            )
            for count in range(1, len(beginning) + 1):
                table[beginning[:count]] = torch.log_softmax(logits[:, count - 1], dim=-1)
        columns = []
        for choice in choices:
            parts = [table[choice[:i]][:, token] for i, token in enumerate(choice)]
            columns.append(torch.stack(parts).sum(dim=0))
        return torch.stack(columns, dim=1)

    def _write(self, read: ReadBatch, max_new_tokens: int) -> list[list[int]]:
        """Greedy tokens of each row, up to the end of its turn."""
        cache, mask, logits = read.fork_cache(), read.mask, read.logits.clone()
        stops = torch.tensor(self._stops, device=mask.device)
        written = torch.empty(len(mask), 0, dtype=torch.long, device=mask.device)
        for step in range(max_new_tokens):
            logits[:, self._never_written] = -torch.inf
            written = torch.cat([written, logits.argmax(dim=-1, keepdim=True)], dim=1)
            if torch.isin(written, stops).any(dim=1).all() or step == max_new_tokens - 1:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = (read.next_position + step)[None, :, None].expand(3, -1, -1)
            grown, cache = self._reader.forward(written[:, -1:], mask, positions, cache)
            logits = grown[:, -1]
        return [_until_stop(row, self._stops) for row in written.tolist()]


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a turn."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})
