"""Train the toy world's video autoencoder, a small stock AutoencoderKLWan."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from examples.toy_world.muon import ConvolutionMuon
from examples.toy_world.training_state import (
    clips_to_tensor,
    load_state,
    render_batch,
    save_state,
    set_rate,
    warmup_cosine,
)

STAGE = 1
LATENT_CHANNELS = 24
STEPS = 2400
DECODER_STEPS = 700
BATCH = 16
MUON_RATE = 5e-3
ADAM_RATE = 1.5e-3
KL_WEIGHT = 1e-4


def build_autoencoder() -> AutoencoderKLWan:
    """Wan 2.2's layout (pixel patches, residual shortcuts, causal time) small enough for a CPU.

    Compresses 8 x 8 pixels and 4 frames into one latent position; the first frame stands alone.
    """
    model = AutoencoderKLWan(
        base_dim=32,
        dim_mult=[1, 2, 2],
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )
    # A posterior as noisy as its prior hides the mean for the first thousand updates.
    torch.nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], -5.0)
    return model


def autoencoder_loss(model: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute and squared error and a light KL; returns (loss, absolute error).

    The squared error matters early: small bright objects would otherwise lose to the background.
    """
    with torch.autocast(video.device.type, torch.bfloat16):
        posterior = model.encode(video).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        decoded = model.decode(latent).sample
    difference = decoded.float() - video
    error = difference.abs().mean()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return error + 2 * (difference**2).mean() + KL_WEIGHT * kl, error


def build_optimizers(model: AutoencoderKLWan) -> list[torch.optim.Optimizer]:
    """Muon for the inner kernels, AdamW for the rest."""
    kernels = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim >= 4
        and "conv_in" not in name
        and "conv_out" not in name
        and min(parameter.shape[:2]) > 8
    ]
    inner = {id(kernel) for kernel in kernels}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inner]
    optimizers = [
        ConvolutionMuon(kernels, MUON_RATE),
        torch.optim.AdamW(rest, ADAM_RATE, (0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_rate"] = group["lr"]
    return optimizers


def training_video(step: int, steps: int) -> Tensor:
    """A batch of pieces of clips: two latent frames at first, three in the last quarter."""
    video = clips_to_tensor(render_batch(STAGE, step * BATCH, BATCH))
    length = 5 if step < 0.75 * steps else 9
    first = step % (video.shape[2] - length + 1)
    return video[:, :, first : first + length]


def train_autoencoder(state_file: Path, device: str = "cpu", steps: int = STEPS) -> None:
    """Train, or go on training, until `steps`; the state file holds everything."""
    torch.manual_seed(STAGE)
    model = build_autoencoder().to(device)
    optimizers = build_optimizers(model)
    state = load_state(state_file) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    began = time.monotonic() - state["seconds"]
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc="autoencoder")
    smooth = float("nan")
    for step in bar:
        torch.manual_seed(STAGE * 1_000_003 + step)
        set_rate(optimizers, warmup_cosine(step, steps, 50))
        loss, error = autoencoder_loss(model, training_video(step, steps).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = error.item() if smooth != smooth else 0.98 * smooth + 0.02 * error.item()
        if step % 50 == 0:
            bar.set_postfix(error=f"{smooth:.4f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(
                state_file,
                {
                    "step": step + 1,
                    "seconds": time.monotonic() - began,
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
            )


def polish_decoder(state_file: Path, device: str = "cpu", steps: int = DECODER_STEPS) -> None:
    """Train the decoder alone on whole clips, whose later frames pieces never showed it.

    The encoder stays as it is, so that latents made before remain valid. Goes on from, and adds to,
    the state file of `train_autoencoder`.
    """
    state = load_state(state_file)
    if state is None or state["step"] < STEPS:
        raise FileNotFoundError(f"{state_file} must hold a finished autoencoder; train it first")
    model = build_autoencoder().to(device)
    model.load_state_dict(state["model"])
    frozen = [*model.encoder.parameters(), *model.quant_conv.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizers = build_optimizers(model)
    for optimizer, saved in zip(optimizers, state.get("decoder_optimizers", []), strict=False):
        optimizer.load_state_dict(saved)
    began = time.monotonic() - state["seconds"]
    done = state.get("decoder_step", 0)
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="decoder")
    for step in bar:
        torch.manual_seed(STAGE * 2_000_003 + step)
        set_rate(optimizers, 0.4 * warmup_cosine(step, steps, 20))
        clips = render_batch(STAGE, 10_000_000 + step * BATCH, BATCH)
        loss, error = autoencoder_loss(model, clips_to_tensor(clips).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(error=f"{error.item():.4f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state.update(
                decoder_step=step + 1,
                seconds=time.monotonic() - began,
                model=model.state_dict(),
                decoder_optimizers=[optimizer.state_dict() for optimizer in optimizers],
            )
            save_state(state_file, state)


def latent_statistics(
    model: AutoencoderKLWan, batches: int = 16
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over fresh training clips."""
    device = next(model.parameters()).device
    latents = []
    with torch.no_grad():
        for index in range(batches):
            clips = render_batch(STAGE, 50_000_000 + index * 32, 32)
            latents.append(model.encode(clips_to_tensor(clips).to(device)).latent_dist.mode())
    latent = torch.cat(latents).float()
    return latent.mean((0, 2, 3, 4)).tolist(), latent.std((0, 2, 3, 4)).tolist()


def save_autoencoder(state_file: Path, folder: Path) -> None:
    """Write the trained autoencoder as a stock diffusers folder with its latent statistics."""
    state = load_state(state_file)
    if state is None:
        raise FileNotFoundError(f"autoencoder state must exist, got {state_file}; train it first")
    model = build_autoencoder()
    model.load_state_dict(state["model"])
    model.requires_grad_(True)
    mean, std = latent_statistics(model.eval())
    model.register_to_config(latents_mean=mean, latents_std=std)
    model.save_pretrained(folder)
