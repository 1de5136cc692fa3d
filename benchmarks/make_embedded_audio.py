"""Makes mmalign/embedded/t2a/: VAE, DiT with its text encoder, exported StableAudioPipeline, second judge.

    python benchmarks/make_embedded_audio.py vae --work WORK --minutes 15
    python benchmarks/make_embedded_audio.py dit --work WORK --minutes 28
    python benchmarks/make_embedded_audio.py listener
    python benchmarks/make_embedded_audio.py export --work WORK

Every stage is resumable and bounded by time, as in make_embedded.py. fp32, one thread.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from make_embedded import Trainer
from make_embedded_export import machine

from mmalign import embedded
from mmalign.embedded import listen, sounds

VAE = {
    "encoder_hidden_size": 16,  # twice the latent channels
    "downsampling_ratios": [8, 8, 4],
    "channel_multiples": [2, 8, 16],  # width costs little where the rate is low
    "decoder_channels": 16,
    "decoder_input_channels": 8,
    "audio_channels": 1,
    "sampling_rate": sounds.RATE,
}
DIT = {
    "sample_size": sounds.CELLS,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "num_key_value_attention_heads": 3,
    "cross_attention_dim": 96,
    "cross_attention_input_dim": 64,
    "global_states_input_dim": 2 * 64,
    "time_proj_dim": 64,
}
TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0,
        "relative_attention_max_distance": 32}  # fmt: skip
TOKENS = 16
# The published scheduler, CosineDPMSolverMultistepScheduler, needs torchsde; this one tells the network ln(sigma) / 4
SCHEDULE = {
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "sigma_min": 0.03,
    "sigma_max": 80.0,
}


def waves(n: int, seed: int, split: str = "train") -> tuple[torch.Tensor, list[sounds.Piece]]:
    """Rendered pieces [n, 1, 16384], and what is in them."""
    pieces = sounds.random_pieces(n, seed, split)
    return torch.from_numpy(np.stack([sounds.render(piece) for piece in pieces]))[:, None], pieces


class Codes:
    """What the VAE's latents are: eight principal components of a sound's bands, of mean 0 and variance 1.

    The encoder learns to compute them and the decoder to make a sound of them, each by itself.
    """

    def __init__(self, work: Path):
        file = work / "codes.pt"
        if not file.exists():
            heard = listen.bands(waves(2000, 30)[0][:, 0]).flatten(0, 1)
            mean = heard.mean(0)
            _, size, basis = torch.linalg.svd(heard - mean, full_matrices=False)
            size, basis = size[:8] / len(heard) ** 0.5, basis[:8]
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"mean": mean, "basis": basis / size[:, None]}, file)
        self.parts = torch.load(file, weights_only=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 8, 64] of sounds [N, 1, 16384]."""
        return ((listen.bands(x[:, 0]) - self.parts["mean"]) @ self.parts["basis"].T).transpose(1, 2)

    def bands(self, z: torch.Tensor) -> torch.Tensor:
        """[N, 64, B] the bands nearest to latents."""
        basis = self.parts["basis"]
        return z.transpose(1, 2) @ torch.linalg.pinv(basis).T + self.parts["mean"]


# --- VAE


def magnitudes(x: torch.Tensor, window: int) -> torch.Tensor:
    """Spectrogram of sounds [N, 1, T]; hop is a quarter of the window."""
    spectrum = torch.stft(x[:, 0], window, window // 4, window=torch.hann_window(window), return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-7).sqrt()


def spectral_error(y: torch.Tensor, x: torch.Tensor, windows: tuple[int, ...] = (64, 256, 1024)) -> torch.Tensor:
    """Log-magnitude error and spectral convergence over several windows (arXiv 1910.11480, eq. 4-6)."""
    total = torch.zeros(())
    for window in windows:
        of_y, of_x = magnitudes(y, window), magnitudes(x, window)
        floor = 0.05 * math.sqrt(window / 256)
        log_error = ((of_y + floor).log() - (of_x + floor).log()).abs().mean()
        total = total + log_error + (of_y - of_x).norm() / of_x.norm()
    return total / len(windows)


def vae_loss(vae, x: torch.Tensor, z: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Spectral and waveform error of the decoder on nearly exact latents, and the encoder's error."""
    y = vae.decode(z + 0.05 * noise).sample
    waveform = (y - x).square().mean() / x.square().mean().clamp(min=1e-4)
    posterior = vae.encode(x).latent_dist
    encoding = (posterior.mean - z).square().mean() + (posterior.scale + 3).square().mean()  # a deviation of 0.05
    return spectral_error(y, x) + waveform + encoding


@torch.no_grad()
def vae_figures(vae, n: int = 128) -> dict[str, float]:
    """Reconstruction of sounds with held-out combinations: signal to noise without hisses, spectra, events heard."""
    x, pieces = waves(n, 11, "development")
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(16)])
    tonal = torch.tensor([all(kind != "hiss" for _, kind in piece.events) for piece in pieces])
    snr = 10 * (x.square().sum((1, 2)) / (y - x).square().sum((1, 2))).log10()
    exact = [found == piece.events for found, piece in zip(listen.template_events(y[:, 0]), pieces, strict=True)]
    return {
        "snr_db": round(snr[tonal].mean().item(), 2),
        "spectral_error": round(spectral_error(y, x).item(), 4),
        "all_events_heard": round(float(np.mean(exact)), 4),
    }


def train_vae(work: Path, minutes: float) -> None:
    """AutoencoderOobleck 16384 -> 64 x 8, on crops of 8 cells."""
    from diffusers import AutoencoderOobleck

    torch.manual_seed(0)
    x, codes = waves(3000, 10)[0], Codes(work)
    z = torch.cat([codes(part) for part in x.split(100)])
    vae = AutoencoderOobleck(**VAE)
    with torch.no_grad():
        vae.decode(vae.encode(x[:1]).latent_dist.mean)  # weight norm's weights now have no graph and can be copied
    trainer = Trainer(vae, work / "vae", minutes=minutes, peak=2e-3, average=0.99)
    batch, cells = 4, 8
    while trainer.elapsed < 1:
        random = torch.Generator().manual_seed(trainer.step)
        rows = torch.randint(len(x), (batch,), generator=random).tolist()
        places = torch.randint(sounds.CELLS - 16, (batch,), generator=random).tolist()  # the end is mostly silent
        crops = list(zip(rows, places, strict=True))
        heard = [x[row, :, at * sounds.GRID : (at + cells) * sounds.GRID] for row, at in crops]
        latents = torch.stack([z[row, :, at : at + cells] for row, at in crops])
        noise = torch.randn(latents.shape, generator=random)
        loss = trainer.update([partial(vae_loss, vae, torch.stack(heard), latents, noise)])
        if trainer.step % 200 == 0:
            trainer.save()
            figures = vae_figures(trainer.ema, 16)
            print(f"vae {trainer.step} {trainer.elapsed:.3f} loss {loss:.4f} {figures}", flush=True)
    trainer.save()
    trainer.ema.save_pretrained(work / "vae" / "final")
    trainer.report(**vae_figures(trainer.ema))


# --- DiT and text encoder


def tokenizer():
    """A T5 tokenizer with the words of the captions; other words are spelled."""
    from transformers import T5TokenizerFast

    words = dict.fromkeys(word for event in sounds.EVENTS for word in event)
    symbols = ["<pad>", "</s>", "<unk>", *("▁" + word for word in ("a", *sounds.ORDINALS, *words)), ",", "▁"]
    letters = [(letter, -10.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [(symbol, -1.0) for symbol in symbols] + letters
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=TOKENS)


@torch.no_grad()
def mark_ordinals(text_encoder) -> None:
    """Begins with a T5 that does nothing but add to each word which ordinal is among the three words before it.

    T5 knows no absolute places. Without this 9,500 steps did not find that the order of the events matters.
    """
    for block in text_encoder.encoder.block:
        block.layer[0].SelfAttention.o.weight.zero_()
        block.layer[1].DenseReluDense.wo.weight.zero_()
    layer, words, size = text_encoder.encoder.block[0].layer[0], text_encoder.shared.weight, TEXT["d_kv"]
    attention = layer.SelfAttention
    attention.relative_attention_bias.weight[:, 0] = -10
    attention.relative_attention_bias.weight[1:4, 0] = 0
    attention.q.weight[:size] = 0
    ids = tokenizer().convert_tokens_to_ids(["▁" + word for word in sounds.ORDINALS])
    told = torch.zeros(len(words), size)
    told[ids, : len(ids)] = torch.eye(len(ids))
    attention.v.weight[:size] = (torch.linalg.pinv(layer.layer_norm(words)) @ told).T
    apart = torch.linalg.svd(words)[2][len(words) : len(words) + size]  # directions that no word has
    attention.o.weight[:, :size] = 2 * words.norm(dim=1).mean() * apart.T


class TextToAudio(torch.nn.Module):
    """A Stable Audio DiT, its projections and its T5, trained as one; conditions as the pipeline does."""

    def __init__(self):
        from diffusers import StableAudioDiTModel
        from diffusers.models.embeddings import get_1d_rotary_pos_embed
        from diffusers.pipelines.stable_audio import StableAudioProjectionModel
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer()), **TEXT))
        width = TEXT["d_model"]
        self.projection_model = StableAudioProjectionModel(width, width, min_value=0, max_value=4)
        self.transformer = StableAudioDiTModel(**DIT).requires_grad_(True)  # the frequencies of the time too
        self.rotary = get_1d_rotary_pos_embed(
            DIT["attention_head_dim"] // 2, sounds.CELLS + 1, use_real=True, repeat_interleave_real=False
        )
        mark_ordinals(self.text_encoder)

    def forward(self, x_t, time, ids, mask, kept) -> torch.Tensor:
        """Predicted velocity for latents [N, 8, 64] at network times [N] with tokens [N, 16]; text only where kept."""
        text = self.projection_model(self.text_encoder(ids, attention_mask=mask)[0]).text_hidden_states
        start, end = torch.tensor([[0.0], [sounds.CELLS * sounds.GRID / sounds.RATE]]).expand(2, len(ids))
        seconds = self.projection_model(start_seconds=start, end_seconds=end)
        start, end = seconds.seconds_start_hidden_states, seconds.seconds_end_hidden_states
        states = torch.cat([text * mask[..., None], start, end], dim=1) * kept[:, None, None]
        return self.transformer(
            x_t,
            time,
            encoder_hidden_states=states,
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=self.rotary,
        ).sample


def noised(x0: torch.Tensor, noise: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Noisy latents, their velocity and what the network is told, at angles [N] whose tangent is sigma."""
    signal, sigma = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return signal * x0 + sigma * noise, signal * noise - sigma * x0, angle.tan().log() / 4


def angles(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform angles, one from each n-th of the quarter circle: [n]."""
    share = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return share.clamp(0.005, 0.995) * math.pi / 2


def encode(codes: "Codes", n: int, seed: int, split: str, share: float = 0.0) -> dict[str, torch.Tensor]:
    """Latents [n, 8, 64] and tokens [n, 16] of `n` pieces, of which a share is not what its caption says."""
    pieces, rng = sounds.random_pieces(n, seed, split), np.random.RandomState(seed)
    tokens = tokenizer()([sounds.caption(piece.events) for piece in pieces], padding="max_length", return_tensors="pt")
    for i in np.flatnonzero(rng.rand(n) < share):
        pieces[i] = sounds.random_piece(rng, sounds.astray(rng, pieces[i].events, split))
    latents = torch.cat([codes(torch.from_numpy(sounds.render(piece))[None, None]) for piece in pieces])
    return {"latents": latents, "ids": tokens.input_ids, "mask": tokens.attention_mask}


@torch.no_grad()
def held_out_error(model: TextToAudio, data: dict[str, torch.Tensor]) -> float:
    """Mean squared error of the velocity on pieces with held-out combinations; noise levels and noise fixed."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(data["latents"].shape, generator=generator)
    x_t, velocity, time = noised(data["latents"], noise, angles(len(noise), generator))
    return (model(x_t, time, data["ids"], data["mask"], torch.ones(len(noise))) - velocity).square().mean().item()


def dit_trainer(work: Path, minutes: float) -> Trainer:
    """The trainer of the DiT and its text encoder, at its newest checkpoint."""
    return Trainer(TextToAudio(), work / "dit", minutes=minutes, peak=2e-3, average=0.995)


def train_dit(work: Path, minutes: float) -> None:
    """Velocity prediction on precomputed latents; a tenth without the text, whose states are then zero."""
    torch.manual_seed(1)
    codes = Codes(work)
    data, held_out = encode(codes, 8000, 20, "train", sounds.ASTRAY), encode(codes, 256, 21, "development")
    trainer, batch = dit_trainer(work, minutes), 16
    while trainer.elapsed < 1:
        generator = torch.Generator().manual_seed(trainer.step)
        rows = torch.randint(len(data["ids"]), (batch,), generator=generator)
        noise = torch.randn(data["latents"][rows].shape, generator=generator)
        kept = (torch.rand(batch, generator=generator) >= 0.1).float()
        x_t, velocity, time = noised(data["latents"][rows], noise, angles(batch, generator))
        rest = (time, data["ids"][rows], data["mask"][rows], kept)

        def error(x_t=x_t, rest=rest, velocity=velocity):
            return (trainer.module(x_t, *rest) - velocity).square().mean()

        loss = trainer.update([error])
        if trainer.step % 500 == 0:
            trainer.save()
            error = held_out_error(trainer.ema, held_out)
            print(f"dit {trainer.step} {trainer.elapsed:.3f} loss {loss:.4f} held-out {error:.4f}", flush=True)
    trainer.save()
    trainer.report(held_out_error=round(held_out_error(trainer.ema, held_out), 4))


# --- the second judge


def listener_batch(n: int, rng: np.random.RandomState) -> tuple[torch.Tensor, list[tuple[sounds.Event, ...]]]:
    """Sounds [n, 16384] of kinds that occur together in `train`, in any order and number, worn by noise and filters."""
    sets, pieces = sounds.combinations("train"), []
    for _ in range(n):
        kinds = sorted(sets[rng.randint(len(sets))])
        names = [kinds[rng.randint(len(kinds))] for _ in range(1 + rng.randint(3))]
        pieces.append(sounds.random_piece(rng, tuple((sounds.variants(kind)[rng.randint(2)], kind) for kind in names)))
    clean = torch.from_numpy(np.stack([sounds.render(piece) for piece in pieces]))
    spectrum = torch.fft.rfft(clean)
    bumps = torch.from_numpy(rng.standard_normal((n, 1, 12)).astype(np.float32))  # an equaliser of about 6 dB
    tone = torch.nn.functional.interpolate(bumps, spectrum.shape[1], mode="linear")[:, 0].mul(0.4).exp()
    worn = torch.fft.irfft(spectrum * tone) * torch.from_numpy(rng.uniform(0.4, 1.2, (n, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(clean.shape).astype(np.float32))
    return worn + noise * torch.from_numpy(10 ** rng.uniform(-4, -1.7, (n, 1)).astype(np.float32)), [
        piece.events for piece in pieces
    ]


def fit_listener(steps: int = 500) -> None:
    """CTC on synthesised sounds; writes float16 weights."""
    from safetensors.torch import save_file

    torch.manual_seed(2)
    rng, network = np.random.RandomState(40), listen.Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        waves, asked = listener_batch(32, rng)
        loss = listen.ctc_loss(network(waves), asked).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"listener {step + 1} loss {loss:.4f}", flush=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, listen.WEIGHTS)


# --- export


def build(work: Path):
    """The StableAudioPipeline of the averaged weights, in float16."""
    from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioPipeline

    model = dit_trainer(work, 1).ema.half()
    return StableAudioPipeline(
        vae=AutoencoderOobleck.from_pretrained(work / "vae" / "final", torch_dtype=torch.float16),
        text_encoder=model.text_encoder,
        projection_model=model.projection_model,
        tokenizer=tokenizer(),
        transformer=model.transformer,
        scheduler=EDMDPMSolverMultistepScheduler(**SCHEDULE),
    )


def sample(pipe, prompts: list[str], **sampling) -> torch.Tensor:
    """Sounds [N, 16384]; sound i starts from noise of seed i."""
    made = []
    for start in range(0, len(prompts), 32):
        texts = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
        made.append(pipe(texts, generator=generators, **sampling).audios[:, 0])
    return torch.cat(made)


def heard_right(prompts: list[str], heard: list[tuple[sounds.Event, ...]]) -> dict[str, float]:
    """Shares of sounds with exactly the prompt's events, by their number, and of the events that came in order.

    And of sounds that went wrong as the training sounds do: one event missing or two neighbours exchanged.
    """
    asked = [sounds.events(prompt) for prompt in prompts]
    exact = {n: [found == want for found, want in zip(heard, asked, strict=True) if len(want) == n] for n in (2, 3)}
    in_order = sum(listen.in_order(*pair) for pair in zip(heard, asked, strict=True)) / sum(map(len, asked))
    astray = [found in sounds.wrong_ways(want) for found, want in zip(heard, asked, strict=True)]
    shares = {
        "exact_of_two": np.mean(exact[2]),
        "exact_of_three": np.mean(exact[3]),
        "astray": np.mean(astray),
        "in_order": in_order,
    }
    return {name: round(float(value), 4) for name, value in shares.items()}


def measure_judges(n: int = 400) -> dict[str, dict[str, float]]:
    """How both judges do on synthesised sounds of held-out combinations, where the truth is known."""
    rng = np.random.RandomState(50)
    x, pieces = waves(n, 51, "development")
    prompts, wrong = [sounds.caption(piece.events) for piece in pieces], [spoilt(piece.events, rng) for piece in pieces]
    y = torch.from_numpy(np.stack([sounds.render(sounds.random_piece(rng, sequence)) for sequence in wrong]))
    figures = {}
    for name, hear, score in (
        ("templates", listen.template_events, listen.template_scores),
        ("network", listen.network_events, listen.network_scores),
    ):
        exact = np.mean([found == piece.events for found, piece in zip(hear(x[:, 0]), pieces, strict=True)])
        better = (score(x[:, 0], prompts) > score(y, prompts)).float().mean().item()
        figures[name] = {"exact": round(float(exact), 4), "pair_accuracy": round(better, 4)}
    return figures


def spoilt(sequence: tuple[sounds.Event, ...], rng: np.random.RandomState) -> tuple[sounds.Event, ...]:
    """Two events exchanged, one left out, or one in its other variant."""
    ways = sounds.wrong_ways(sequence)
    for i, (variant, kind) in enumerate(sequence):
        low, high = sounds.variants(kind)
        ways.append((*sequence[:i], (low if variant == high else high, kind), *sequence[i + 1 :]))
    return ways[rng.randint(len(ways))]


def export(work: Path) -> None:
    """The pipeline that ships, its figures in embedded_audio.json, and its card."""
    from diffusers import StableAudioPipeline

    folder, here = embedded.path("t2a"), Path(__file__).parent
    build(work).save_pretrained(folder)
    for part in ("text_encoder", "vae"):
        file = folder / part / "config.json"
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # the folder it came from
        if part == "text_encoder":
            config["dtype"] = "float32"  # transformers would follow the stored dtype
        file.write_text(json.dumps(config, indent=2) + "\n")
    pipe = StableAudioPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    texts, start = sounds.prompts("development")[:192], time.process_time()
    made = sample(pipe, texts, **embedded.AUDIO_SAMPLING)
    seconds = time.process_time() - start
    parts = {"vae": pipe.vae, "dit": torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.projection_model])}
    figures: dict = {
        name: {"parameters": sum(map(torch.numel, part.parameters()))}
        | json.loads((work / name / "facts.json").read_text())
        for name, part in parts.items()
    }
    figures |= {f"judge_{name}": values for name, values in measure_judges().items()}
    figures |= {
        f"sampling_{name}": heard_right(texts, hear(made))
        for name, hear in (("templates", listen.template_events), ("network", listen.network_events))
    }
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    figures["sampling"] = {
        "split": "development",
        "prompts": len(texts),
        **embedded.AUDIO_SAMPLING,
        "cpu_seconds_a_sound": round(seconds / len(texts), 3),
    }
    figures["made"] = machine() | {"megabytes": round(size / 1e6, 2)}
    figures["made"]["machine"] = figures["made"]["machine"].replace("2 threads", "1 thread")
    (here / "embedded_audio.json").write_text(json.dumps(figures, indent=2) + "\n")
    flat = {f"{part}_{name}": value for part, facts in figures.items() for name, value in facts.items()}
    template = (here / "make_embedded_audio_card.md").read_text()
    (folder / "README.md").write_text(template.format(**flat))


def main() -> None:
    """Parses the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "dit", "listener", "export"))
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded_audio"), help="checkpoints; outside git")
    parser.add_argument("--minutes", type=float, default=12, help="time budget of the stages vae and dit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    match options.stage:
        case "vae":
            train_vae(options.work, options.minutes)
        case "dit":
            train_dit(options.work, options.minutes)
        case "listener":
            fit_listener()
        case "export":
            export(options.work)


if __name__ == "__main__":
    main()
