"""The classifier: two linear heads that say which frames are broken, and whether the clip is.

They read what the judge's text model knows right behind each frame. Axes: B sequences, L tokens, D
width, N frames of all sequences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

HEADS = "cac_heads"
"""Name of the heads within the judge's module."""
HEADS_FILE = "cac_heads.safetensors"


class ClassifierHeads(nn.Module):
    """Log-odds of a fault in each frame, and in the whole clip from the last frame's state.

    Attached to a judge it reads along with every forward pass that was announced by `watch`.
    """

    def __init__(self, width: int, caption_tokens: int = 0) -> None:
        super().__init__()
        self.captions = nn.Linear(width, caption_tokens * width) if caption_tokens else None
        self.frame = nn.Linear(width, 1)
        self.clip = nn.Linear(width, 1)
        for one in (self.frame, self.clip):
            nn.init.zeros_(one.weight)
            nn.init.zeros_(one.bias)
        self._ends: Tensor | None = None
        self._caption_labels: Tensor | None = None
        self._read: tuple[Tensor, Tensor] | None = None
        self.caption_loss: Tensor | None = None
        """Of the last pass that was announced with captions: mean cross-entropy of their tokens."""

    def watch(self, frame_ends: Tensor, captions: Tensor | None = None) -> None:
        """Announce the next pass.

        Args:
            frame_ends: [N 2] of row and place right behind each frame, in order.
            captions: [N caption_tokens] of what each frame shows; -100 where nothing is to be
                said. None says nothing of them.
        """
        self._ends, self._caption_labels = frame_ends, captions
        self._read = self.caption_loss = None

    def take(self) -> tuple[Tensor, Tensor]:
        """Log-odds [N] of the frames and [B] of the clips of the pass that was announced.

        Raises:
            RuntimeError: If there was none.
        """
        if self._read is None:
            raise RuntimeError("heads must be told of a pass by watch() before it runs")
        read, self._read = self._read, None
        return read

    def forward(self, hidden: Tensor, frame_ends: Tensor) -> tuple[Tensor, Tensor]:
        """Read states [B L D]; a clip without frames has log-odds 0."""
        rows, places = frame_ends.unbind(1)
        states = hidden[rows, places].to(self.frame.weight.dtype)
        last = torch.full((len(hidden),), -1, device=hidden.device, dtype=torch.long)
        # Of several frames in a row the last counts; plain indexing would leave that open on a GPU.
        numbers = torch.arange(len(rows), device=hidden.device)
        last = last.scatter_reduce(0, rows, numbers, "amax")
        padded = torch.cat([states, states.new_zeros(1, states.shape[1])])
        clips = self.clip(padded)[last, 0] * (last >= 0)
        return self.frame(states)[:, 0], clips

    def say_captions(
        self, hidden: Tensor, frame_ends: Tensor, labels: Tensor, output_embedding: nn.Module
    ) -> Tensor:
        """Mean cross-entropy of all tokens of the captions, each said at once.

        Args:
            hidden: [B L D].
            frame_ends: [N 2].
            labels: [N caption_tokens]; -100 where nothing is to be said.
            output_embedding: [... D] to [... V], the judge's own.
        """
        assert self.captions is not None
        rows, places = frame_ends.unbind(1)
        states = self.captions(hidden[rows, places].to(self.captions.weight.dtype))
        states = states.view(len(rows), -1, hidden.shape[-1])
        said = labels != -100
        if not said.any():
            # All that learns takes part in every pass, as DDP expects.
            return states.sum() * 0
        logits = output_embedding(states[said].to(hidden.dtype))
        return cross_entropy(logits.float(), labels[said])

    def _along(self, hidden: Tensor, output_embedding: nn.Module) -> None:
        if self._ends is None:
            return
        ends, self._ends = self._ends, None
        labels, self._caption_labels = self._caption_labels, None
        self._read = self(hidden, ends)
        if self.captions is not None and labels is not None:
            self.caption_loss = self.say_captions(hidden, ends, labels, output_embedding)

    def save(self, folder: str | Path) -> None:
        """Write `cac_heads.safetensors` into a judge's folder."""
        state = {name: one.detach().float().cpu() for name, one in self.state_dict().items()}
        save_file(state, Path(folder) / HEADS_FILE)

    def restore(self, folder: str | Path) -> bool:
        """Read them back; False where the folder has none.

        Raises:
            ValueError: If they are no heads, or of another width.
        """
        path = Path(folder) / HEADS_FILE
        if not path.is_file():
            return False
        state = load_file(path)
        needed = [name for name in self.state_dict() if "captions" not in name]
        if not state.keys() >= set(needed):
            raise ValueError(
                f"heads must hold {', '.join(needed)}, got {', '.join(state)} in {path}"
            )
        width = state["frame.weight"].shape[1]
        if width != self.frame.in_features:
            raise ValueError(
                f"heads must read states of {self.frame.in_features} numbers, got {width} in {path}"
            )
        mine = self.state_dict().get("captions.weight", torch.empty(0))
        if state.get("captions.weight", torch.empty(0)).shape != mine.shape:
            # Captions of another length begin anew.
            state = {name: one for name, one in state.items() if "captions" not in name}
        self.load_state_dict(state, strict=False)
        return True


def attach_heads(model: Any, caption_tokens: int = 0) -> ClassifierHeads:
    """Give a judge its heads; those it has already are returned."""
    if hasattr(model, HEADS):
        return getattr(model, HEADS)
    heads = ClassifierHeads(model.config.get_text_config().hidden_size, caption_tokens)
    heads = heads.to(next(model.parameters()).device)
    setattr(model, HEADS, heads)

    def read(module: nn.Module, arguments: tuple, output: Any) -> None:
        # Within the judge's own pass, and by calling its module: where FSDP or ZeRO shard the
        # weights, they are whole there and nowhere else.
        heads._along(output.last_hidden_state, model.get_output_embeddings())
        if heads._read is not None and not output.last_hidden_state.requires_grad:
            # Where heads alone learn: FSDP adds up the gradients of a pass from whose output it
            # is gone back through, and of no other.
            nothing = sum((one.sum() for one in heads._read), torch.zeros(())) * 0
            output.last_hidden_state = output.last_hidden_state + nothing.to(
                output.last_hidden_state
            )

    model.model.register_forward_hook(read)
    return heads
