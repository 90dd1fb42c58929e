"""What the families of diffusers have in common: loading, prompts, guidance, sizes.

Axes as in `generators/base.py`. A family's file says the rest.
"""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings
from diffusion_rl.generators.execution import place, place_text_encoders
from diffusion_rl.generators.families import check_pipeline_class
from diffusion_rl.generators.prompt_cache import Entry, PromptCache, fingerprint
from diffusion_rl.generators.settings import OFFLOADED_PARTS, ExecutionSettings
from diffusion_rl.generators.weight_savings import placing_savings, precision_savings
from diffusion_rl.memory_errors import Saving, explain_out_of_memory
from diffusion_rl.sharding import device_of_passes

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a pipeline loads; a hub repository also holds pictures, and whole checkpoints at its root.
HUB_FILES = ["*.json", "*/*.safetensors", "*.txt", "*.model", "*.jinja"]
DEFAULT_EXECUTION = ExecutionSettings()


class AbstractPipelineGenerator(AbstractVideoGenerator):
    """A pipeline of diffusers behind the loop's interface; the pipeline itself stays stock.

    The rollout takes Euler steps over the pipeline's own noise levels.

    Args:
        pipeline: a loaded pipeline of the family's class.
        height: pixels, a multiple of `pixel_factor`.
        width: pixels, a multiple of `pixel_factor`.
        num_frames: frames of a video, 1 more than a multiple of `frame_factor`.
        fps: frames per second the model was trained at.
        max_sequence_length: text tokens a prompt is padded or cut to.
        batched_guidance: one pass of 2 B for guidance, the faster way; False takes two passes of
            B, half the memory.
    """

    pipeline_class: ClassVar[Any]
    """Of diffusers."""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Parts of the pipeline that only prompts need."""
    source: tuple[str, str] | None = None
    """Folder that the pipeline was loaded from, and the type; None for one that was built."""
    execution: ExecutionSettings = DEFAULT_EXECUTION
    """How it is run."""
    prompt_cache: PromptCache | None = None
    """Where embeddings are kept; with one, the text encoder is loaded when a prompt needs it."""
    released: bool = False
    """Whether the text encoder is gone for good."""

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int,
        width: int,
        num_frames: int,
        fps: float,
        max_sequence_length: int,
        batched_guidance: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.height, self.width, self.num_frames, self.fps = height, width, num_frames, fps
        self.max_sequence_length = max_sequence_length
        self.batched_guidance = batched_guidance
        self.check_pipeline()
        for name, value in (("height", height), ("width", width)):
            if value < self.pixel_factor or value % self.pixel_factor:
                rule = f"a positive multiple of {self.pixel_factor}"
                raise ValueError(f"{name} must be {rule}, got {value}")
        if num_frames < 1 or (num_frames - 1) % self.frame_factor:
            raise ValueError(
                f"num_frames must be 1 more than a multiple of {self.frame_factor}, "
                f"got {num_frames}"
            )
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        local_path: str | Path | None = None,
        revision: str | None = None,
        execution: ExecutionSettings = DEFAULT_EXECUTION,
        prompt_cache: str | Path | None = None,
        **size: Any,
    ) -> Self:
        """Load a pipeline's folder, or a hub model from the cache or the network.

        Args:
            path_or_hub_id: a folder, or an id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
            dtype: of transformer and text encoder; the autoencoder stays in float32, where its
                decoding is stable.
            device: `cpu`, `cuda`, `cuda:1`, ...
            local_path: a folder to read instead of the hub; the id stays as the name.
            revision: of the hub model.
            execution: what saves memory and time.
            prompt_cache: a folder to keep embeddings in; with it the text encoder is loaded only
                when a prompt is not there.
            **size: height, width, num_frames, fps, max_sequence_length, and the family's options.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        folder = find_folder(path_or_hub_id, local_path, revision)
        check_pipeline_class(folder, cls.pipeline_class.__name__)
        later = {} if prompt_cache is None else dict.fromkeys(cls.text_encoders)
        parts = [one for one in OFFLOADED_PARTS if one not in later]
        with explain_out_of_memory(
            "loading the generator", partial(precision_savings, folder, dtype, parts)
        ):
            pipeline = cls.pipeline_class.from_pretrained(folder, **_loading(dtype), **later)
        pipeline.set_progress_bar_config(disable=True)
        with explain_out_of_memory(
            f"moving the generator to {device}",
            partial(placing_savings, folder, dtype, execution, parts),
        ):
            place(pipeline, execution, torch.device(device), cls.text_encoders)
        generator = cls(pipeline, **size)
        generator.source, generator.execution = (folder, dtype), execution
        if prompt_cache is not None:
            identity = cls.embedding_identity(folder, Path(prompt_cache), dtype, device)
            identity["max_sequence_length"] = generator.max_sequence_length
            generator.prompt_cache = PromptCache(prompt_cache, identity)
        return generator

    @classmethod
    def embedding_identity(
        cls, folder: str, cache: Path, dtype: str, device: str
    ) -> dict[str, Any]:
        """What embeddings follow from besides the prompt and its length."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in cls.text_encoders)
        parts = (*cls.text_encoders, *tokenizers)
        return {
            "pipeline": cls.pipeline_class.__name__,
            "files": fingerprint([Path(folder) / part for part in parts], cache),
            "dtype": dtype,
            "device": torch.device(device).type,
            "versions": [diffusers.__version__, transformers.__version__, torch.__version__],
        }

    def load_text_encoders(self) -> None:
        """Load what was left out because the cache might hold every prompt."""
        assert self.source is not None
        folder, dtype = self.source
        parts = self.pipeline.components.items()
        rest = {name: part for name, part in parts if name not in self.text_encoders}
        loaded = self.pipeline_class.from_pretrained(folder, **_loading(dtype), **rest)
        for name in self.text_encoders:
            encoder = getattr(loaded, name)
            setattr(self.pipeline, name, encoder.requires_grad_(False).eval())
        place_text_encoders(self.pipeline, self.execution, self.device, self.text_encoders)

    @property
    def device(self) -> torch.device:
        # Of other weights that wait elsewhere diffusers knows where they are used.
        transformer = self.pipeline.transformer
        return device_of_passes(transformer) or transformer.device

    @abstractmethod
    def check_pipeline(self) -> None:
        """Refuse a pipeline that this family's file would run wrongly."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """Frames and pixels of a side that one latent position stands for."""

    @property
    @abstractmethod
    def pixel_factor(self) -> int:
        """What height and width must be multiples of."""

    @property
    def frame_factor(self) -> int:
        """What num_frames - 1 must be a multiple of."""
        return self.compression[0]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        frames, pixels = self.compression
        return (
            self.pipeline.transformer.config.out_channels,
            (self.num_frames - 1) // frames + 1,
            self.height // pixels,
            self.width // pixels,
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the transformer's inputs; kept, since diffusers walks every module to find it."""
        return self.pipeline.transformer.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeddings:
        if not prompts:
            raise ValueError("prompts must be at least one text, got none")
        with explain_out_of_memory("encoding prompts", self.encoding_savings):
            rows = [self._known_or_encoded(prompt) for prompt in prompts]
            empty, empty_extras = self._known_or_encoded("")
        extras = {name: torch.cat([more[name] for _, more in rows]) for name in empty_extras}
        return PromptEmbeddings(torch.cat([row for row, _ in rows]), empty, extras, empty_extras)

    def encoding_savings(self) -> list[Saving]:
        """What would help where there is no memory for the text encoder beside the rest."""
        if self.source is None:
            return []
        folder, dtype = self.source
        if self.device.type == "cpu":
            return precision_savings(folder, dtype, OFFLOADED_PARTS)
        return placing_savings(folder, dtype, self.execution, OFFLOADED_PARTS)

    def _known_or_encoded(self, prompt: str) -> Entry:
        """From the cache, or else from the text encoder and into the cache."""
        entry = None if self.prompt_cache is None else self.prompt_cache.read(prompt)
        if entry is not None:
            embedding, extras = entry
            return embedding.to(self.device), {
                name: one.to(self.device) for name, one in extras.items()
            }
        if self.released:
            raise RuntimeError(
                "encode_prompts must be called before release_text_encoder; "
                "the text encoder is gone, load the generator again for other prompts"
            )
        if getattr(self.pipeline, self.text_encoders[0]) is None:
            logger.info("loading the text encoder: not every prompt is in the cache")
            self.load_text_encoders()
        entry = self.encode_one(prompt)
        if self.prompt_cache is not None:
            self.prompt_cache.write(prompt, entry)
        return entry

    def encode_one(self, prompt: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Embedding [1 L D] of a prompt, and what else the transformer reads of it."""
        embedding, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return embedding, {}

    def release_text_encoder(self) -> None:
        self.released = True
        for name in self.text_encoders:
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sigmas(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        # A copy, so that the pipeline's own schedule is not moved.
        return self.schedule(copy.deepcopy(self.pipeline.scheduler), num_steps).to(torch.float32)

    def schedule(self, scheduler: Any, num_steps: int) -> Tensor:
        """Noise levels [K+1] as the family's pipeline asks its scheduler for them."""
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas

    def predict(
        self, latent: Tensor, sigma: Tensor, embeddings: PromptEmbeddings, guidance_scale: float
    ) -> Tensor:
        sigma = sigma.to(latent.device, torch.float32).expand(len(latent))
        text = embeddings.conditional.to(latent.device, self.dtype)
        extras = {
            name: one.to(latent.device) for name, one in embeddings.conditional_extras.items()
        }
        if guidance_scale == 1.0:
            return self.velocity(latent, sigma, text, extras)
        empty = _rows(embeddings.unconditional.to(text), text)
        empty_extras = {
            name: _rows(embeddings.unconditional_extras[name].to(one), one)
            for name, one in extras.items()
        }
        if self.batched_guidance:
            both = self.velocity(
                torch.cat([latent, latent]),
                torch.cat([sigma, sigma]),
                torch.cat([text, empty]),
                {name: torch.cat([one, empty_extras[name]]) for name, one in extras.items()},
            )
            conditional, unconditional = both.chunk(2)
        else:
            conditional = self.velocity(latent, sigma, text, extras)
            unconditional = self.velocity(latent, sigma, empty, empty_extras)
        scale = self.guidance_at(sigma, guidance_scale)
        return unconditional + scale * (conditional - unconditional)

    def guidance_at(self, sigma: Tensor, guidance_scale: float) -> float | Tensor:
        """Guidance at noise levels [B], as it multiplies [B C T H W]."""
        del sigma
        return guidance_scale

    @abstractmethod
    def velocity(
        self, latent: Tensor, sigma: Tensor, text: Tensor, extras: Mapping[str, Tensor]
    ) -> Tensor:
        """One pass of the transformer.

        Args:
            latent: [B C T H W] float32.
            sigma: [B] float32.
            text: [B L D] in the transformer's type.
            extras: [B ...] as `encode_one` gave them.

        Returns:
            Velocity [B C T H W] in float32.
        """


def _loading(dtype: str) -> dict[str, Any]:
    """How a pipeline's folder is read."""
    dtypes = {"default": DTYPES[dtype], "vae": torch.float32}
    return {"dtype": dtypes, "local_files_only": True}


def check_flow_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler of another process than flow matching."""
    name = type(scheduler).__name__
    if not ("FlowMatch" in name or scheduler.config.get("use_flow_sigmas")):
        raise ValueError(
            "pipeline.scheduler must be a flow-matching one (FlowMatchEulerDiscreteScheduler, or "
            f"UniPC with use_flow_sigmas), got {name}"
        )


def find_folder(
    path_or_hub_id: str | Path, local_path: str | Path | None, revision: str | None
) -> str:
    """The folder to load from; one error names the id, the cache and the way round the hub."""
    folder = Path(local_path or path_or_hub_id)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"generator.path must be a diffusers pipeline folder with a model_index.json, "
                f"got {folder}"
            )
        return str(folder)
    if local_path is not None:
        raise FileNotFoundError(f"--local-path must be an existing folder, got {local_path}")
    try:
        return snapshot_download(
            str(path_or_hub_id), revision=revision, allow_patterns=HUB_FILES, etag_timeout=5
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"generator.path must be a folder or a reachable hub id, got {path_or_hub_id}; "
            f"it is neither a folder, nor in the cache {HF_HUB_CACHE}, nor reachable on the hub "
            f"({type(error).__name__}); download it elsewhere and pass --local-path FOLDER"
        ) from error


def _rows(one: Tensor, like: Tensor) -> Tensor:
    """[1 ...] repeated for each row of `like`."""
    return one.expand(len(like), *one.shape[1:])
