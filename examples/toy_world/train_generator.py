"""Train the toy text-to-video generator: a stock WanPipeline folder of 1.6M parameters.

It learns from clips of which about half carry faults while their prompts never say so, so it has
every reason to break things now and then, as its big relatives do.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffusion_rl.weight_files import forget_source
from examples.toy_world.training_state import (
    clips_to_tensor,
    compile_blocks,
    load_state,
    render_batch,
    save_state,
    set_rate,
    warmup_cosine,
)
from examples.toy_world.world import COLOURS, MOTIONS, SHAPES

STAGE = 2
BANK = 32_768
BATCH = 64
STEPS = 22_000
MUON_RATE = 3e-3
ADAM_RATE = 1e-3
TEXT_LENGTH = 32
TEXT_WIDTH = 64
PROMPT_DROPOUT = 0.1
FLOW_SHIFT = 3.0
LAST_SIGMA = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world's prompts; anything else is <unk>."""
    words = {"a", "and", "moving", *COLOURS, *SHAPES, *" ".join(MOTIONS).split()}
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Two small T5 layers, trained with the transformer."""
    settings = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(settings)


def build_transformer(latent_channels: int) -> WanTransformer3DModel:
    """Six layers of width 128 over 4 x 4 x 4 latent positions."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


class GeneratorModel(nn.Module):
    """What the generator's training moves: text encoder and transformer together."""

    def __init__(self, latent_channels: int, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(len(tokenizer))
        self.transformer = build_transformer(latent_channels)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Predict the velocity (noise - data); padding is zeroed as WanPipeline does."""
        mask = tokens != 0
        text = self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        return self.transformer(noisy, sigma * 1000, text).sample


def build_latent_bank(autoencoder: Path, file: Path, device: str) -> None:
    """Encode the training clips once; [N C T H W] half precision, normalised, with prompts."""
    if file.exists():
        return
    model = AutoencoderKLWan.from_pretrained(autoencoder).to(device).eval()
    mean = torch.tensor(model.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
    latents, prompts = [], []
    with torch.no_grad():
        for first in tqdm(range(0, BANK, 64), desc="latent bank"):
            clips = render_batch(STAGE, first, 64)
            latent = model.encode(clips_to_tensor(clips).to(device)).latent_dist.mode().cpu()
            latents.append(((latent - mean) / std).half())
            prompts += [clip.prompt for clip in clips]
    save_state(file, {"latents": torch.cat(latents), "prompts": prompts})


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices for Muon; embeddings, heads, norms, biases and convolutions for AdamW."""
    muon, adam = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and ("blocks." in name or ".layers." in name)
        (muon if hidden and "table" not in name and "bias" not in name else adam).append(parameter)
    return muon, adam


def build_optimizers(
    model: nn.Module, muon_rate: float, adam_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for the rest; each group remembers its base rate."""
    muon, adam = split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(muon, lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_rate"] = group["lr"]
    return optimizers


def sample_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1): logit-normal, moved towards noise by the scheduler's shift."""
    sigma = torch.sigmoid(torch.randn(count, generator=generator))
    return FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)


def drop_prompts(tokens: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Blank some prompts of a batch [B L], so that guidance has an unconditional side."""
    words = tokens.clone()
    blank = torch.rand(len(tokens), generator=random) < PROMPT_DROPOUT
    words[blank] = torch.tensor([1] + [0] * (TEXT_LENGTH - 1))
    return words


def train_generator(
    bank_file: Path, state_file: Path, device: str = "cpu", steps: int = STEPS
) -> None:
    """Train, or go on training, until `steps`; the state file holds weights, average, optimiser."""
    bank = torch.load(bank_file, weights_only=True)
    latents, prompts = bank["latents"], bank["prompts"]
    tokenizer = build_tokenizer()
    tokens = tokenizer(
        prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    ).input_ids
    torch.manual_seed(STAGE)
    model = GeneratorModel(latents.shape[1], tokenizer).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizers = build_optimizers(model, MUON_RATE, ADAM_RATE)
    state = load_state(state_file) or {"step": 0, "seconds": 0.0}
    if state["step"]:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    compile_blocks(model.transformer.blocks)
    began = time.monotonic() - state["seconds"]
    bar = tqdm(range(state["step"], steps), initial=state["step"], total=steps, desc="generator")
    smooth = float("nan")
    for step in bar:
        random = torch.Generator().manual_seed(STAGE * 1_000_003 + step)
        set_rate(optimizers, warmup_cosine(step, steps, 100))
        pick = torch.randint(len(latents), (BATCH,), generator=random)
        data = latents[pick].float().to(device)
        noise = torch.randn(data.shape, generator=random).to(device)
        sigma = sample_sigma(BATCH, random).to(device)
        words = drop_prompts(tokens[pick], random)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * data + level * noise
        # The fused attention kernel's backward pass is slower than plain products on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                predicted = model(noisy, sigma, words.to(device))
            loss = (predicted.float() - (noise - data)).square().mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        smooth = loss.item() if smooth != smooth else 0.99 * smooth + 0.01 * loss.item()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(
                state_file,
                {
                    "step": step + 1,
                    "seconds": time.monotonic() - began,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                },
            )


def save_generator(autoencoder: Path, state_file: Path, folder: Path) -> None:
    """Write the averaged weights as a stock WanPipeline folder."""
    state = load_state(state_file)
    if state is None:
        raise FileNotFoundError(f"generator state must exist, got {state_file}; train it first")
    tokenizer = build_tokenizer()
    vae = AutoencoderKLWan.from_pretrained(autoencoder)
    model = GeneratorModel(vae.config.z_dim, tokenizer)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.load_state_dict(state["average"])
    trained = average.module.eval()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=trained.text_encoder,
        vae=vae,
        transformer=trained.transformer,
        # Without a terminal the schedule's last step has next to no length and is wasted.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT, shift_terminal=LAST_SIGMA),
    ).save_pretrained(folder)
    forget_source(folder)
