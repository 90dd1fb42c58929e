"""How a generator is run: what saves memory, what saves time; everything is off by default."""

from __future__ import annotations

from dataclasses import dataclass

OFFLOADED_PARTS = ("transformer", "text_encoder", "vae")
OFFLOAD_LEVELS = ("block", "leaf")
# Of diffusers' table those that have a backward pass and load no code from the hub.
ATTENTION_BACKENDS = (
    *("native", "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "xformers", "flex"),
    *("_native_cudnn", "_native_efficient", "_native_flash", "_native_math"),
)


@dataclass(frozen=True, kw_only=True)
class OffloadSettings:
    """Weights that wait in the computer's memory and visit the device only to be used."""

    parts: tuple[str, ...] = OFFLOADED_PARTS
    """Of transformer, text_encoder, vae. What learns always stays on the device."""
    level: str = "block"
    """Of the transformer: block (groups of its blocks take turns) or leaf (single layers, least
    memory, slowest). Text encoders and the autoencoder move by the layer."""
    blocks_per_group: int = 1
    """Blocks that move together, at least 1; only with level block."""

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) != len(self.parts):
            raise ValueError(f"parts must be named once each, at least one, got {self.parts}")
        for part in self.parts:
            if part not in OFFLOADED_PARTS:
                raise ValueError(f"parts must be of {', '.join(OFFLOADED_PARTS)}, got {part}")
        if self.level not in OFFLOAD_LEVELS:
            raise ValueError(f"level must be one of {', '.join(OFFLOAD_LEVELS)}, got {self.level}")
        if self.blocks_per_group < 1:
            raise ValueError(f"blocks_per_group must be at least 1, got {self.blocks_per_group}")
        if self.level == "leaf" and self.blocks_per_group != 1:
            raise ValueError(
                f"blocks_per_group must be left out with level leaf, got {self.blocks_per_group}"
            )


@dataclass(frozen=True, kw_only=True)
class ContextParallelSettings:
    """One video's tokens shared out over ring * ulysses processes, which work on the same videos.

    Where a multiple of them runs, each such team has its own share of an update's videos.
    """

    ring: int = 1
    """Devices that pass keys and values round, at least 1."""
    ulysses: int = 1
    """Devices that share out the attention heads, at least 1."""

    def __post_init__(self) -> None:
        for name, value in (("ring", self.ring), ("ulysses", self.ulysses)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.ring * self.ulysses < 2:
            raise ValueError(
                "ring or ulysses must be above 1, got 1 and 1; leave context_parallel out"
            )

    @property
    def size(self) -> int:
        """Processes that share one video."""
        return self.ring * self.ulysses


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """Memory and speed of a generator, by diffusers' own means."""

    gradient_checkpointing: bool = False
    """Keep only what enters a block and compute it again in the backward pass: a fraction of the
    memory for about a third more time. Sampling is not touched."""
    vae_tiling: bool = False
    """Decode in overlapping tiles; videos larger than a tile differ a little at the seams."""
    vae_slicing: bool = False
    """Decode one video at a time."""
    offload: OffloadSettings | None = None
    """Which weights wait in the computer's memory; None keeps all on the device."""
    attention: str | None = None
    """Attention backend of the transformer, one of ATTENTION_BACKENDS; None is diffusers' own
    choice, native. Never another than is asked for."""
    compile_blocks: str | None = None
    """Backend of torch.compile (inductor) for the transformer's repeated blocks; None is none."""
    context_parallel: ContextParallelSettings | None = None
    """Share out the tokens of a video over processes; None does not."""

    def __post_init__(self) -> None:
        if self.attention is not None and self.attention not in ATTENTION_BACKENDS:
            why = ""
            if "sage" in self.attention:
                why = "; sage has no backward pass, so that nothing would learn through attention"
            elif "hub" in self.attention:
                why = "; it would run code from the hub, install the kernels' package instead"
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {self.attention}"
                f"{why}"
            )
        if self.offload is None or "transformer" not in self.offload.parts:
            return
        if not self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing must be true where offload.parts has the transformer, got "
                "false; without it the backward pass would keep every weight on the device"
            )
        for name in ("compile_blocks", "context_parallel"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be left out where offload.parts has the transformer, got "
                    f"{getattr(self, name)}"
                )
