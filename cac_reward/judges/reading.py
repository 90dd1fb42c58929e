"""Conversations to what a transformers model has read of them, in batches and never twice.

The scorer asks several things about one conversation in a row: weigh the first word, write the
windows, look again, weigh the verdict. While `remember` is on, what was read before stays in the
key-value cache and only the new part of a conversation is read.

Axes: B conversations of a batch, L tokens, V vocabulary, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cac_reward.judges.base import Conversation, check_conversations
from cac_reward.judges.families import Family
from cac_reward.judges.rendering import Renderer, TokenizedConversation

STATES = ("recurrent_states", "conv_states")
"""Where transformers' linear attention layers keep what they have read."""


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """A batch that the model has read; never changed, so that it can be continued twice."""

    conversations: list[TokenizedConversation]
    mask: Tensor
    """[B L] 1 for tokens, 0 for the padding before and between them."""
    cache: Any
    """transformers' key-value cache of L tokens."""
    logits: Tensor
    """[B V] float32 for the next token."""
    next_position: Tensor
    """[B] rotary position of the next token."""
    num_new: list[int]
    """[B] tokens read in this pass; the others were remembered."""

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a state in place of keys and values (Qwen3.5).

        Padding in the midst of a conversation would change such a state.
        """
        return any(hasattr(layer, STATES[0]) for layer in self.cache.layers)

    def memory_bytes(self) -> int:
        return sum(one.nbytes for layer in self.cache.layers for one in _kept(layer))

    def fork_cache(self, rows: Sequence[int] | None = None) -> Any:
        """A cache that grows on its own; shares keys and values with this one until then."""
        twin = copy.copy(self.cache)
        twin.layers = [_fork_layer(layer) for layer in self.cache.layers]
        if rows is not None and list(rows) != list(range(len(self.mask))):
            twin.reorder_cache(torch.tensor(rows))
        return twin


class BatchReader:
    """Runs a transformers vision-language model over conversations.

    Args:
        model: a loaded model whose inner model has `get_rope_index`.
        processor: its processor.
        family: its conventions.
        pad_token_id: any token; padding is masked.
        max_batch_tokens: most tokens read in one pass; a longer conversation is read alone.
        max_memory_bytes: most bytes of key-value cache remembered.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        family: Family,
        pad_token_id: int,
        max_batch_tokens: int,
        max_memory_bytes: int,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        self.model = model
        self.processor = processor
        self.family = family
        self.max_batch_tokens = max_batch_tokens
        self.max_memory_bytes = max_memory_bytes
        self.memory: list[ReadBatch] | None = None
        self.renderer = Renderer(processor, family)
        self._pad_token_id = pad_token_id

    def read(
        self,
        conversations: Sequence[Conversation],
        prefixes: Sequence[str],
        tools: Sequence[Mapping[str, object]],
    ) -> Iterator[tuple[list[int], ReadBatch]]:
        """Read conversations up to the end of their prefixes.

        Yields:
            The rows of a batch and what was read, until every row had its turn.

        Raises:
            ValueError: If a conversation has nothing to answer, holds control tokens in its
                text, or a frame does not fit the patches.
        """
        check_conversations(conversations)
        tokenized = self.renderer.tokenize(conversations, prefixes, tools)
        known = [self._recall(one) for one in tokenized]
        for rows in self._batches(tokenized, known):
            batch = [tokenized[row] for row in rows]
            read = self._read_batch(batch, known[rows[0]][0], [known[row][1] for row in rows])
            if self.memory is not None:
                self.memory.append(read)
                while sum(old.memory_bytes() for old in self.memory) > self.max_memory_bytes:
                    self.memory.pop(0)
            yield rows, read

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
        *,
        frames: Sequence[Tensor] = (),
        keep: int = 1,
    ) -> tuple[Tensor, Any]:
        """One pass of the model.

        Args:
            ids: [B K] new tokens.
            mask: [B L] of what was read before and the new tokens.
            positions: [3 B K] rotary positions of the new tokens.
            cache: what was read before; grows in place.
            frames: those whose placeholders are among the new tokens, in order.
            keep: how many last tokens to return logits for.

        Returns:
            Logits [B keep V] float32, and the grown cache.
        """
        pictures: Mapping[str, Tensor] = {}
        if frames:
            pictures = self.processor.image_processor(
                images=[frame.float() for frame in frames],
                disable_grouping=False,
                return_tensors="pt",
                **self.family.picture_options,
            ).to(self.model.device)
        output = self.model(
            input_ids=ids,
            # Without padding the causal kernel needs no mask, and is faster so.
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **pictures,
        )
        return output.logits.float(), output.past_key_values

    def _recall(self, new: TokenizedConversation) -> tuple[ReadBatch | None, int]:
        """The longest remembered beginning of a conversation: its batch and row."""
        best: tuple[ReadBatch | None, int] = (None, 0)
        longest = 0
        for read in self.memory or []:
            for row, old in enumerate(read.conversations):
                if longest < len(old.tokens) < len(new.tokens) and _begins(new, old):
                    best, longest = (read, row), len(old.tokens)
        return best

    def _batches(
        self,
        tokenized: Sequence[TokenizedConversation],
        known: Sequence[tuple[ReadBatch | None, int]],
    ) -> Iterator[list[int]]:
        """Rows to read together: continuing one batch, of like lengths, with bounded tokens."""

        def group(row: int) -> tuple[int, int]:
            past, old = known[row]
            if past is None or not past.recurrent:
                return (id(past), 0)
            # A state that is continued takes no padding, so the new parts must be equally long.
            new = len(tokenized[row].tokens) - len(past.conversations[old].tokens)
            return (id(past), new)

        order = sorted(
            range(len(tokenized)), key=lambda row: (group(row), len(tokenized[row].tokens))
        )
        batch: list[int] = []
        for row in order:
            tokens = (len(batch) + 1) * len(tokenized[row].tokens)
            together = not batch or group(row) == group(batch[0])
            if batch and not (together and tokens <= self.max_batch_tokens):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _read_batch(
        self, batch: list[TokenizedConversation], past: ReadBatch | None, past_rows: list[int]
    ) -> ReadBatch:
        """One pass over what is new in each conversation."""
        nothing = TokenizedConversation([], [])
        old = [past.conversations[row] if past else nothing for row in past_rows]
        new = [one.tokens[len(was.tokens) :] for one, was in zip(batch, old, strict=True)]
        frames = [
            frame
            for one, was in zip(batch, old, strict=True)
            for frame in one.frames[len(was.frames) :]
        ]
        length = max(len(tokens) for tokens in new)
        ids = torch.full((len(new), length), self._pad_token_id)
        mask = torch.zeros(len(new), length, dtype=torch.long)
        positions = torch.zeros(3, len(new), length, dtype=torch.long)
        next_position = torch.zeros(len(new), dtype=torch.long)
        for row, (tokens, whole) in enumerate(zip(new, self._positions(batch), strict=True)):
            start = length - len(tokens)
            ids[row, start:] = torch.tensor(tokens)
            mask[row, start:] = 1
            positions[:, row, start:] = whole[:, -len(tokens) :]
            next_position[row] = whole.max() + 1
        device = self.model.device
        mask = mask.to(device)
        cache = None
        if past is not None:
            mask = torch.cat([past.mask[past_rows], mask], dim=1)
            cache = past.fork_cache(past_rows)
        logits, cache = self.forward(
            ids.to(device), mask, positions.to(device), cache, frames=frames
        )
        num_new = [len(tokens) for tokens in new]
        return ReadBatch(batch, mask, cache, logits[:, -1], next_position.to(device), num_new)

    def _positions(self, batch: Sequence[TokenizedConversation]) -> list[Tensor]:
        """The family's own rotary positions [3 L]; conversations of one shape share them."""
        known: dict[tuple[bytes, tuple], Tensor] = {}
        found = []
        for one in batch:
            ids = torch.tensor([one.tokens])
            kinds = (ids == self.renderer.image_token_id).int()
            grid = tuple(self.renderer.grid(frame) for frame in one.frames)
            shape = (kinds.numpy().tobytes(), grid)
            if shape not in known:
                image_grid_thw = torch.tensor(grid) if grid else None
                known[shape] = self.model.model.get_rope_index(
                    ids, kinds, image_grid_thw=image_grid_thw
                )[0][:, 0]
            found.append(known[shape])
        return found


def _kept(layer: Any) -> list[Tensor]:
    """Every tensor that a layer of a cache holds."""
    states = [state for name in STATES for state in getattr(layer, name, {}).values()]
    found = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [one for one in found if one is not None]


def _fork_layer(layer: Any) -> Any:
    """A layer that grows on its own: states are written in place, keys and values are not."""
    twin = copy.copy(layer)
    for name in STATES:
        if hasattr(layer, name):
            states = getattr(layer, name)
            setattr(
                twin,
                name,
                {key: one if one is None else one.clone() for key, one in states.items()},
            )
    return twin


def _begins(new: TokenizedConversation, old: TokenizedConversation) -> bool:
    """Whether a conversation begins with an older one: the same frames, then the same tokens."""
    return (
        len(old.frames) <= len(new.frames)
        and all(a is b for a, b in zip(new.frames, old.frames, strict=False))
        and new.tokens[: len(old.tokens)] == old.tokens
    )
