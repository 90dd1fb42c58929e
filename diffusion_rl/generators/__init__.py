"""Text-to-video generators behind one interface; one file per pipeline family of diffusers."""

from diffusion_rl.generators.base import AbstractVideoGenerator, PromptEmbeddings

__all__ = ["AbstractVideoGenerator", "PromptEmbeddings"]
