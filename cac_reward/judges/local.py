"""A judge on this machine: transformers' own model and processor, in batches.

Axes: B conversations of a batch, V vocabulary, N choices.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cac_reward.calibration import Calibration
from cac_reward.frames import JudgeSettings
from cac_reward.judges.base import AbstractJudge, Conversation, one_prefix_each
from cac_reward.judges.families import find_family
from cac_reward.judges.loading import LoadOptions, find_files, fingerprint, load
from cac_reward.judges.reading import BatchReader, ReadBatch
from cac_reward.judges.tokens import current_meter
from cac_reward.judges.votes import Votes, count_votes

logger = logging.getLogger(__name__)

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

    votes: Votes | None = None
    """How sampled answers decide in the place of log-probabilities; None where they do not."""
    _origin: LocalJudge | None = None

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
        self.attention = model.config._attn_implementation
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
        self.patch_factor = self._reader.renderer.patch_factor
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
        base: str | Path | None = None,
        quantization: str | None = None,
    ) -> LocalJudge:
        """Load a judge, or share the one that is loaded already from the same files.

        Args:
            path_or_hub_id: folder or id on the hub, of a checkpoint or of a peft adapter.
            device: where it runs, for example 'cpu' or 'cuda:0'.
            dtype: 'float32', 'bfloat16' or 'float16'.
            attention: 'sdpa', 'eager', 'flash_attention_2' or 'xformers'; what cannot run here is
                an error, and no other takes its place.
            revision: branch, tag or commit on the hub; None for the main branch.
            base: folder or id of an adapter's base; None for the one that the adapter names.
            quantization: '8bit' or '4bit' through bitsandbytes; None for the weights as they are.

        Raises:
            FileNotFoundError: If the judge is not there and cannot be fetched.
            ValueError: If the files are no complete checkpoint of a known family, or an argument
                breaks its rule.
            ImportError: If attention or quantization needs a package that is not installed.
        """
        options = LoadOptions(
            device=device, dtype=dtype, attention=attention, quantization=quantization
        )
        files = find_files(path_or_hub_id, revision=revision, base=base)
        key = (cls, files, files.facts(), options)
        judge = _LOADED.get(key)
        if judge is None:
            model, processor = load(files, options)
            judge = cls(
                model,
                processor,
                judge_id=files.judge_id,
                revision=files.revision,
                settings=JudgeSettings.load(files.settings_folder),
            )
            judge.fingerprint = fingerprint(files, options)
            judge.calibration = Calibration.load(files.folder)
            judge.quantization = quantization
            logger.info("judge %s runs on %s, attention %s", judge.name, device, judge.attention)
            _LOADED[key] = judge
        return judge

    def asked_as(
        self, *, settings: JudgeSettings | None = None, votes: Votes | None = None
    ) -> LocalJudge:
        """The same judge, weights shared, asked in another way; None keeps what it has."""
        twin = copy.copy(self)
        twin._origin = self  # Keeps it findable for the next one who loads these files.
        twin.settings = settings or self.settings
        if votes is not None:
            twin.votes, twin.decoder = votes, votes.decoder
        return twin

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
        meter = current_meter(len(answers))
        with self._lock:
            for rows, read in self._reader.read(conversations, prefixes, tools):
                written = self._write(read, max_new_tokens)
                for row, new, tokens in zip(rows, read.num_new, written, strict=True):
                    answers[row] += self._tokenizer.decode(tokens, skip_special_tokens=True)
                    meter.add(row, read=new, written=_num_written(tokens, max_new_tokens))
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
        if self.votes is not None:
            return self._count(conversations, choices, prefixes, tools, self.votes)
        encoded = self._tokenizer(list(choices), add_special_tokens=False)["input_ids"]
        tokens = [tuple(one) for one in encoded]
        tried = sum(map(len, _beginnings(tokens)))
        log_probs = torch.empty(len(conversations), len(tokens))
        meter = current_meter(len(conversations))
        with self._lock:
            for rows, read in self._reader.read(conversations, prefixes, tools):
                log_probs[rows] = self._weigh(read, tokens).cpu()
                for row, new in zip(rows, read.num_new, strict=True):
                    meter.add(row, read=new + tried, written=0)
        return log_probs

    def probabilities(self, log_probs: Tensor) -> Tensor:
        """As in the base class; where votes decide, NaN for a clip that none of them judged."""
        if self.votes is not None:
            return torch.softmax(log_probs, dim=-1)
        return super().probabilities(log_probs)

    def _count(
        self,
        conversations: Sequence[Conversation],
        choices: Sequence[str],
        prefixes: Sequence[str],
        tools: Sequence[Mapping[str, object]],
        votes: Votes,
    ) -> Tensor:
        """[B N] log of how many sampled answers make each choice; each row has its own dice."""
        counted = torch.empty(len(conversations), len(choices))
        meter = current_meter(len(conversations))
        with self._lock:
            for rows, read in self._reader.read(conversations, [""] * len(conversations), tools):
                texts: list[list[str]] = [[] for _ in rows]
                for row, new in zip(rows, read.num_new, strict=True):
                    meter.add(row, read=new, written=0)
                for vote in range(votes.num_votes):
                    dice = [torch.Generator().manual_seed(votes.seed + vote) for _ in rows]
                    pick = partial(_sample, temperature=votes.temperature, dice=dice)
                    written = self._write(read, votes.max_new_tokens, pick)
                    for row, said, tokens in zip(rows, texts, written, strict=True):
                        said.append(self._tokenizer.decode(tokens, skip_special_tokens=True))
                        count = _num_written(tokens, votes.max_new_tokens)
                        meter.add(row, read=0, written=count)
                for row, said in zip(rows, texts, strict=True):
                    counted[row] = count_votes(said, prefixes[row], choices)
        return counted

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
        for beginning in _beginnings(choices):
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

    def _write(
        self, read: ReadBatch, max_new_tokens: int, pick: Callable[[Tensor], Tensor] | None = None
    ) -> list[list[int]]:
        """Tokens of each row up to the end of its turn; `pick` takes [B V] to [B], or greedily."""
        pick = pick or partial(torch.argmax, dim=-1)
        cache, mask, logits = read.fork_cache(), read.mask, read.logits.clone()
        stops = torch.tensor(self._stops, device=mask.device)
        written = torch.empty(len(mask), 0, dtype=torch.long, device=mask.device)
        for step in range(max_new_tokens):
            logits[:, self._never_written] = -torch.inf
            written = torch.cat([written, pick(logits)[:, None]], dim=1)
            if torch.isin(written, stops).any(dim=1).all() or step == max_new_tokens - 1:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = (read.next_position + step)[None, :, None].expand(3, -1, -1)
            grown, cache = self._reader.forward(written[:, -1:], mask, positions, cache)
            logits = grown[:, -1]
        return [_until_stop(row, self._stops) for row in written.tolist()]


def _sample(logits: Tensor, *, temperature: float, dice: Sequence[torch.Generator]) -> Tensor:
    """[B] one token of each row of [B V]; a row's draw depends on its own dice only."""
    chances = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=one) for row, one in zip(chances, dice, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def _beginnings(choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What has to be read to weigh the last token of each choice; the longest cover the others."""
    found: list[tuple[int, ...]] = []
    for one in sorted({choice[:-1] for choice in choices}, key=len, reverse=True):
        if one and not any(longer[: len(one)] == one for longer in found):
            found.append(one)
    return found


def _num_written(tokens: Sequence[int], max_new_tokens: int) -> int:
    """Tokens of an answer with the one that ended it, which is not among them."""
    return min(len(tokens) + 1, max_new_tokens)


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a turn."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None})
