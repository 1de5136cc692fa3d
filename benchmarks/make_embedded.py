"""Makes mmalign/embedded/: sprites, tokenizer, VAE, UNet with its two text encoders, exported pipeline.

    python benchmarks/make_embedded.py sprites --icons package/icons.json
    python benchmarks/make_embedded.py vae --work WORK --minutes 40
    python benchmarks/make_embedded.py unet --work WORK --minutes 90
    python benchmarks/make_embedded.py export --work WORK

Every stage is resumable: the same command goes on from the newest checkpoint in WORK. Training is bounded by
time, not by steps: the learning rate follows a cosine over the elapsed share of --minutes, so a slower
machine gives fewer steps but a finished schedule. fp32, 2 threads; seeds are fixed, but time decides the step
count, so weights repeat only approximately. The artwork's source is in make_embedded_art.py.
"""

import argparse
import copy
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import make_embedded_art
import make_embedded_export
import numpy as np
import torch

from mmalign.embedded import scenes

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": scenes.SIDE,
    "mid_block_add_attention": False,
    "force_upcast": False,
}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 2, 4),  # diffusers' name for the number of heads
    "norm_num_groups": 16,
    "cross_attention_dim": 64 + 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 128 + 6 * 16,
}
TEXT = {
    "vocab_size": 4610,
    "max_position_embeddings": 24,
    "bos_token_id": 4608,
    "eos_token_id": 4609,
    "pad_token_id": 4609,
}
SCALING = 0.7  # times unit-variance latents: less of the ground's colour leaks through the noise at t = 999


def pictures(n: int, seed: int, split: str = "train") -> tuple[torch.Tensor, list[scenes.Scene]]:
    """Rendered scenes, uint8 [n, 3, 64, 64], and what is in them."""
    every = scenes.random_scenes(n, seed, split)
    pixels = torch.from_numpy(np.stack([scenes.render(scene) for scene in every]))
    return pixels.permute(0, 3, 1, 2).contiguous(), every  # channels-last is 2.5 times slower here


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to float in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


class Trainer:
    """AdamW, a cosine over wall-clock time, averaged weights and checkpoints: what both stages share."""

    def __init__(self, module: torch.nn.Module, folder: Path, *, minutes: float, peak: float, average: float):
        self.module, self.file, self.seconds, self.peak = module, folder / "checkpoint.pt", minutes * 60, peak
        self.ema, self.average = copy.deepcopy(module).requires_grad_(False), average
        self.step, self.spent = 0, 0.0
        self.parameters, self.threads = list(module.parameters()), ThreadPoolExecutor(2)
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step, self.spent = state["step"], state["spent"]
            for name in ("module", "ema", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
        self.since = time.monotonic() - self.spent

    @property
    def elapsed(self) -> float:
        """Share of the time budget that is used up; 1 or more means done."""
        return (time.monotonic() - self.since) / self.seconds

    def update(self, halves: list) -> float:
        """One optimizer step on the mean of two losses, each a function and each in its own thread.

        Two threads that meet once a step bear a busy machine better than two that meet in every operation.
        """
        rate = math.cos(math.pi / 2 * min(1, self.elapsed)) ** 2 * min(1, (self.step + 1) / 150)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * max(rate, 0.002)
        results = list(self.threads.map(self.gradient, halves))
        for parameter, *parts in zip(self.parameters, *(gradients for _, gradients in results), strict=True):
            parameter.grad = None if parts[0] is None else torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.ema.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        return sum(loss for loss, _ in results) / len(results)

    def gradient(self, function) -> tuple[float, tuple]:
        """The value of a loss function and its gradient."""
        loss = function()
        return loss.item(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def save(self) -> None:
        """Writes the checkpoint, atomically."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("module", "ema", "optimizer")}
        state |= {"step": self.step, "spent": time.monotonic() - self.since}
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def report(self, **figures: float) -> None:
        """Writes what the stage took and reached to facts.json."""
        facts = {"steps": self.step,
                 "seconds": round(time.monotonic() - self.since), **figures}  # fmt: skip
        self.file.with_name("facts.json").write_text(json.dumps(facts))
        print(facts, flush=True)


# --- VAE


def edges(difference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the two pictures' gradients, from the difference of the pictures."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


@torch.no_grad()
def psnr(vae, n: int = 512) -> float:
    """Reconstruction of scenes with held-out combinations, dB, mean over pictures, latents at their mean."""
    pixels, _ = pictures(n, 11, "development")
    values = []
    for batch in pixels.split(64):
        x = to_model(batch)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * (((y - x) / 2) ** 2).mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def normalise(vae) -> None:
    """Folds the latents' mean and deviation into the 1x1 convolutions: then they are 0 and 1 a channel."""
    pixels, _ = pictures(2048, 12)
    z = torch.cat([vae.encode(to_model(batch)).latent_dist.mean for batch in pixels.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    out, into = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    out.weight[:n] /= std[:, None, None, None]
    out.bias[:n] = (out.bias[:n] - mean) / std
    out.bias[n:] -= 2 * std.log()  # log-variance
    into.bias += into.weight[:, :, 0, 0] @ mean
    into.weight *= std[None, :, None, None]


def vae_loss(vae, x: torch.Tensor) -> torch.Tensor:
    """Squared, absolute and edge error of the reconstruction and a small KL term; what is not ground counts more."""
    ground = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2).median(dim=2).values
    away = (x - ground[:, :, None, None]).abs().amax(1, keepdim=True)
    posterior = vae.encode(x).latent_dist
    difference = (vae.decode(posterior.sample()).sample - x) * (1 + 3 * away.clamp(max=0.5))
    fit = 5 * difference.square().mean() + difference.abs().mean() + 0.5 * edges(difference)
    return fit + 2e-7 * posterior.kl().mean()


def around_object(pixels: torch.Tensor, every: list[scenes.Scene], rows: torch.Tensor) -> torch.Tensor:
    """32 x 32 pixels around the objects of some pictures: a quarter of the work, most of the detail."""
    crops = []
    for row in rows.tolist():
        reach = min(scenes.REACH[every[row].size], 16)
        x, y = (16 + reach * way for way in scenes.PLACES[every[row].place])
        crops.append(pixels[row, :, y : y + 32, x : x + 32])
    return torch.stack(crops)


def train_vae(work: Path, minutes: float) -> None:
    """AutoencoderKL 64 x 64 x 3 -> 16 x 16 x 8: mostly on crops around objects, then on whole pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    pixels, every = pictures(20_000, 10)
    vae = AutoencoderKL(**VAE, scaling_factor=SCALING)
    trainer = Trainer(vae, work / "vae", minutes=minutes, peak=2e-3, average=0.995)
    while trainer.elapsed < 1:
        random = torch.Generator().manual_seed(trainer.step)
        if trainer.elapsed < 0.4:
            x = around_object(pixels, every, torch.randint(len(pixels), (40,), generator=random))
        else:
            x = pixels[torch.randint(len(pixels), (16,), generator=random)]
        loss = trainer.update([partial(vae_loss, vae, half) for half in to_model(x).chunk(2)])
        if trainer.step % 250 == 0:
            trainer.save()
            reached = psnr(trainer.ema, 128)
            print(f"vae {trainer.step} {trainer.elapsed:.2f} loss {loss:.4f} psnr {reached:.2f}", flush=True)
    trainer.save()
    normalise(trainer.ema)
    trainer.ema.save_pretrained(work / "vae" / "final")
    trainer.report(psnr_db=round(psnr(trainer.ema), 2))


# --- UNet and text encoders


class TextToImage(torch.nn.Module):
    """An SDXL UNet and its two text encoders, trained as one; conditions as the exported pipeline does."""

    def __init__(self):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        small, large = (
            CLIPTextConfig(**TEXT, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                           num_attention_heads=heads, projection_dim=width)
            for width, layers, heads in ((64, 2, 2), (128, 3, 4))
        )  # fmt: skip
        self.unet = UNet2DConditionModel(**UNET)
        self.text_encoder, self.text_encoder_2 = CLIPTextModel(small), CLIPTextModelWithProjection(large)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted noise for latents [N, 8, 16, 16] at timesteps [N] with tokens [N, 24]."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        side = float(scenes.SIDE)
        sizes = torch.tensor([side, side, 0.0, 0.0, side, side]).expand(len(ids), 6)  # original, crop, target
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
        return self.unet(x_t, t, embeds, added_cond_kwargs=added).sample


def alphas_cumprod() -> torch.Tensor:
    """The signal's share of the variance at timesteps 0 ... 999, SDXL's schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**make_embedded_export.SCHEDULE).alphas_cumprod


def stratified(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform timesteps, one from each n-th of 0 ... 999: [n]."""
    return ((torch.arange(n) + torch.rand(n, generator=generator)) * (1000 / n)).long().clamp(max=999)


def noised(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """Latents [N, 8, 16, 16] with the share of signal `alpha_bar` [N]."""
    share = alpha_bar[:, None, None, None]
    return share.sqrt() * x0 + (1 - share).sqrt() * noise


@torch.no_grad()
def posterior(vae, pixels: torch.Tensor):
    """Mean and deviation of the latents of uint8 pictures, before scaling."""
    return vae.encode(to_model(pixels)).latent_dist


def encode(vae, n: int, seed: int, split: str) -> dict[str, torch.Tensor]:
    """Latent mean and deviation [n, 8, 16, 16] (scaled) and tokens [n, 24] of `n` scenes."""
    tokens = make_embedded_art.cut_tokenizer()
    pixels, every = pictures(n, seed, split)
    with ThreadPoolExecutor(2) as threads:
        posteriors = list(threads.map(partial(posterior, vae), pixels.split(64)))
    texts = [scenes.caption(scene) for scene in every]
    return {
        "mean": torch.cat([p.mean for p in posteriors]) * SCALING,
        "std": torch.cat([p.std for p in posteriors]) * SCALING,
        "ids": tokens(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids,
    }


def cached(work: Path, vae, n: int = 32_000) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Encoded training scenes and 512 held-out ones, made once."""
    file = work / "latents.pt"
    if not file.exists():
        torch.save((encode(vae, n, 20, "train"), encode(vae, 512, 21, "development")), file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def held_out_error(model: TextToImage, data: dict[str, torch.Tensor], alpha_bar: torch.Tensor) -> float:
    """Mean squared error of the noise on scenes with held-out combinations; timesteps and noise fixed."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for mean, ids in zip(data["mean"].split(64), data["ids"].split(64), strict=True):
        t, noise = stratified(len(ids), generator), torch.randn(mean.shape, generator=generator)
        prediction = model(noised(mean, noise, alpha_bar[t]), t, ids)
        total += (prediction - noise).square().mean((1, 2, 3)).sum().item()
    return total / len(data["ids"])


def unet_loss(model, x_t, t, ids, noise, weight) -> torch.Tensor:
    """Weighted mean squared error of the predicted noise."""
    return (weight * (model(x_t, t, ids) - noise).square().mean((1, 2, 3))).mean()


def unet_trainer(work: Path, minutes: float) -> Trainer:
    """The trainer of the UNet and its text encoders, at its newest checkpoint."""
    return Trainer(TextToImage(), work / "unet", minutes=minutes, peak=2e-3, average=0.998)


def train_unet(work: Path, minutes: float, snapshots: Path | None) -> None:
    """Noise prediction on precomputed latents. Two choices make the text decide the ground's colour.

    The weight is min-SNR (5) times sqrt(1 + 1/SNR): plain noise prediction gives the high noise levels, where
    ground and layout are settled, next to no gradient. And latents are scaled to deviation 0.7, see SCALING.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae = AutoencoderKL.from_pretrained(work / "vae" / "final")
    data, held_out = cached(work, vae)
    alpha_bar, batch, shown = alphas_cumprod(), 64, time.monotonic()
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / snr * (1 + 1 / snr).sqrt()
    empty = make_embedded_art.cut_tokenizer()("", padding="max_length", return_tensors="pt").input_ids
    trainer = unet_trainer(work, minutes)
    while trainer.elapsed < 1:
        generator = torch.Generator().manual_seed(trainer.step)
        rows = torch.randint(len(data["ids"]), (batch,), generator=generator)
        noise, draw = torch.randn(2, batch, *data["mean"].shape[1:], generator=generator)
        t, dropped = stratified(batch, generator), torch.rand(batch, 1, generator=generator) < 0.1
        ids = torch.where(dropped, empty, data["ids"][rows])
        x_t = noised(data["mean"][rows] + data["std"][rows] * draw, noise, alpha_bar[t])
        halves = zip(*(value.view(batch // 2, 2, *value.shape[1:]).unbind(1)
                       for value in (x_t, t, ids, noise, weight[t])), strict=True)  # fmt: skip
        loss = trainer.update([partial(unet_loss, trainer.module, *half) for half in halves])
        if trainer.step % 250 == 0:
            trainer.save()
            error = held_out_error(trainer.ema, held_out, alpha_bar)
            print(f"unet {trainer.step} {trainer.elapsed:.3f} loss {loss:.4f} held-out {error:.4f}", flush=True)
        if snapshots and time.monotonic() - shown > 600:
            shown = time.monotonic()
            make_embedded_export.save(trainer.ema, vae, snapshots / f"step-{trainer.step}")
            (snapshots.parent / "LATEST").write_text(str(snapshots / f"step-{trainer.step}"))
    trainer.save()
    trainer.report(held_out_error=round(held_out_error(trainer.ema, held_out, alpha_bar), 4))


def export(work: Path) -> None:
    """The averaged weights, as the pipeline that ships."""
    from diffusers import AutoencoderKL

    vae, model = AutoencoderKL.from_pretrained(work / "vae" / "final"), unet_trainer(work, 1).ema
    figures = {
        name: {"parameters": sum(map(torch.numel, part.parameters()))}
        | json.loads((work / name / "facts.json").read_text())
        for name, part in (("vae", vae), ("unet", model))
    }
    make_embedded_export.export(model, vae, figures)


def main() -> None:
    """Parses the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("sprites", "vae", "unet", "export"))
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded"), help="checkpoints; outside git")
    parser.add_argument("--minutes", type=float, default=15, help="time budget of the stages vae and unet")
    parser.add_argument("--icons", type=Path, help="icons.json of the artwork, for the stage sprites")
    parser.add_argument("--snapshots", type=Path, help="folder for a pipeline every ten minutes of the stage unet")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads work side by side instead: see Trainer.update
    match options.stage:
        case "sprites":
            make_embedded_art.draw_sprites(options.icons)
        case "vae":
            train_vae(options.work, options.minutes)
        case "unet":
            train_unet(options.work, options.minutes, options.snapshots)
        case "export":
            export(options.work)


if __name__ == "__main__":
    main()
