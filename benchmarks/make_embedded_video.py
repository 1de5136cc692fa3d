"""Makes mmalign/embedded/t2v/: VAE, transformer with its text encoder, and the exported WanPipeline.

    python benchmarks/make_embedded_video.py vae --work WORK --minutes 15
    python benchmarks/make_embedded_video.py dit --work WORK --minutes 30
    python benchmarks/make_embedded_video.py export --work WORK --output mmalign/embedded/t2v
    python benchmarks/make_embedded_video.py measure --output mmalign/embedded/t2v

Every stage is resumable and bounded by time, as in make_embedded.py. fp32. The model is not made yet: the VAE wants
more than half an hour of a free core.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from make_embedded import Trainer
from torch import nn

from mmalign.embedded import motions, scenes

VAE = {
    "base_dim": 24,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
    "patch_size": 4,  # pixels that are folded into channels before the first convolution
    "in_channels": 48,
    "out_channels": 48,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
DIT = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 96,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}
READER = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
TOKENS = 16  # that a caption is padded to
DROPPED = 0.1  # of the captions, for guidance


def clips(n: int, seed: int, split: str = "train") -> tuple[torch.Tensor, list[motions.Clip]]:
    """Rendered clips [n, 3, frames, 64, 64] in [-1, 1], and what is in them."""
    found = motions.random_clips(n, seed, split)
    pixels = torch.from_numpy(np.stack([motions.render(clip) for clip in found]))
    return pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1, found


def tokenizer():
    """Words of the captions, as a T5 Unigram model."""
    from transformers import T5TokenizerFast

    words = {word for split in motions.SPLITS for prompt in motions.prompts(split) for word in prompt.split()}
    symbols = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in sorted(words))]
    vocabulary = [(symbol, -float(number) / len(symbols)) for number, symbol in enumerate(symbols)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS), len(symbols)


# --- VAE


def make_vae(folder: Path, minutes: float) -> None:
    """Trains the VAE on reconstruction, with a small KL term."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE)
    trainer = Trainer(vae, folder, minutes=minutes, peak=2e-3, average=0.995)
    print(sum(p.numel() for p in vae.parameters()) / 1e6, "M", flush=True)

    def loss(seed: int) -> torch.Tensor:
        pixels, _ = clips(8, seed)
        posterior = vae.encode(pixels).latent_dist
        made = vae.decode(posterior.sample()).sample
        difference = made - pixels
        sharp = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return difference.abs().mean() + difference.square().mean() + sharp + 1e-4 * posterior.kl().mean() / 1000

    total = 0.0
    while trainer.elapsed < 1:
        total += trainer.update([partial(loss, trainer.step)])  # one: the VAE keeps its frames in itself as it goes
        if trainer.step % 50 == 0:
            print(trainer.step, f"{trainer.elapsed:.2f}", f"{total / 50:.4f}", flush=True)
            total = 0.0
        if trainer.step % 200 == 0:
            trainer.save()
    trainer.save()
    vae.load_state_dict(trainer.ema.state_dict())
    vae.eval().requires_grad_(False)
    latents = torch.cat([vae.encode(clips(16, 10_000_000 + n)[0]).latent_dist.mean for n in range(16)])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    vae.save_pretrained(folder / "model")
    pixels, _ = clips(64, 11, "development")
    made = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(8)])
    error = ((made - pixels) / 2).square().mean((1, 2, 3, 4))
    trainer.report(psnr_db=round(float((-10 * error.log10()).mean()), 2))


# --- transformer


class Both(nn.Module):
    """Transformer and text encoder, which learn together."""

    def __init__(self) -> None:
        from diffusers import WanTransformer3DModel
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        self.transformer = WanTransformer3DModel(**DIT)
        self.reader = UMT5EncoderModel(UMT5Config(vocab_size=tokenizer()[1], **READER))


def make_dit(folder: Path, vae_folder: Path, minutes: float) -> None:
    """Trains the transformer on flow matching, t logit-normal as the trainer draws it."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval().requires_grad_(False)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    store = folder / "latents.pt"
    if not store.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts, texts = [], []
        for n in range(160):
            pixels, found = clips(32, 20_000_000 + n)
            parts.append((vae.encode(pixels).latent_dist.mean - mean) / std)
            texts += [motions.caption(clip.noun, clip.colour, clip.direction) for clip in found]
        torch.save({"latents": torch.cat(parts), "texts": texts}, store)
    data = torch.load(store, weights_only=True)
    latents, texts = data["latents"], data["texts"]
    words = tokenizer()[0](texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    nothing = tokenizer()[0]([""], padding="max_length", max_length=TOKENS, return_tensors="pt")
    print(len(latents), "clips", latents.shape, flush=True)
    torch.manual_seed(0)
    both = Both()
    trainer = Trainer(both, folder, minutes=minutes, peak=1e-3, average=0.999)
    print([sum(p.numel() for p in part.parameters()) / 1e6 for part in (both.transformer, both.reader)], flush=True)

    def loss(seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(latents), (16,), generator=rng)
        x0, t = latents[rows], torch.sigmoid(torch.randn(16, generator=rng))
        noise = torch.randn(x0.shape, generator=rng)
        dropped = torch.rand(16, generator=rng) < DROPPED
        ids, mask = (
            torch.where(dropped[:, None], nothing[name], words[name][rows]) for name in ("input_ids", "attention_mask")
        )
        embeds = both.reader(ids, mask).last_hidden_state * mask[..., None]  # as the pipeline pads them
        at = t.view(-1, 1, 1, 1, 1)
        velocity = both.transformer((1 - at) * x0 + at * noise, 1000 * t, embeds, return_dict=False)[0]
        return (velocity - (noise - x0)).square().mean()

    total = 0.0
    while trainer.elapsed < 1:
        total += trainer.update([partial(loss, 2 * trainer.step + half) for half in (0, 1)])
        if trainer.step % 100 == 0:
            print(trainer.step, f"{trainer.elapsed:.2f}", f"{total / 100:.4f}", flush=True)
            total = 0.0
        if trainer.step % 200 == 0:
            trainer.save()
    trainer.save()
    trainer.report()


def export(work: Path, output: Path) -> None:
    """The averaged weights as a WanPipeline, in half precision."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    both = Both()
    both.load_state_dict(torch.load(work / "dit" / "checkpoint.pt", weights_only=True)["ema"])
    pipeline = WanPipeline(
        tokenizer=tokenizer()[0],
        text_encoder=both.reader,
        vae=AutoencoderKLWan.from_pretrained(work / "vae" / "model"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=both.transformer,
    )
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        part.to(torch.float16)
    pipeline.save_pretrained(output)


@torch.no_grad()
def measure(folder: Path, split: str, count: int, steps: int, guidance: float) -> dict[str, float]:
    """What the judges say of generated clips, and of the truth."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = motions.prompts(split)[:count]
    settings = {"height": motions.SIDE, "width": motions.SIDE, "num_frames": motions.FRAMES}
    settings |= {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": TOKENS}
    found = []
    for start in range(0, count, 16):
        noise = [torch.Generator().manual_seed(start + n) for n in range(len(prompts[start : start + 16]))]
        made = pipeline(prompts[start : start + 16], generator=noise, output_type="np", **settings).frames
        found += list((made * 255).round().astype(np.uint8))
    pairs = list(zip(found, prompts, strict=True))
    judges = (motions.goes_there, motions.flows_there, motions.ground_is_right)
    return {judge.__name__: float(np.mean([judge(*pair) for pair in pairs])) for judge in judges}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "dit", "export", "measure"])
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--output", type=Path, default=Path(scenes.__file__).parent / "t2v")
    parser.add_argument("--split", default="development")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    given = parser.parse_args()
    if given.stage == "vae":
        make_vae(given.work / "vae", given.minutes)
    elif given.stage == "dit":
        make_dit(given.work / "dit", given.work / "vae" / "model", given.minutes)
    elif given.stage == "export":
        export(given.work, given.output)
    else:
        print(measure(given.output, given.split, given.count, given.steps, given.guidance))


if __name__ == "__main__":
    main()
