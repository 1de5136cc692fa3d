"""Scorers that are a LAION CLAP: how well a sound fits its prompt.

Source: LAION-AI/CLAP @ 1fd4c37, laion_clap/hook.py and training/data.py (get_mel, get_audio_features); torchlibrosa
@ d4e8add, stft.py. The model is transformers' ClapModel. Its feature extractor is not used: by default it starts at
0 Hz instead of 50, it cuts at random, and in a batch without long sounds it takes a random one for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.media import sound_of
from mmalign.records import UserError
from mmalign.scoring.scorer import Card, Scorer

RATE_HZ, WINDOW, HOP, MELS = 48_000, 1024, 480, 64
SAMPLES, FRAMES = 10 * RATE_HZ, 1001
TOKENS = 77
CROPS = ("seeded", "centre")
REMEMBERED_PROMPTS = 4096  # best-of-N, pairs and validation ask for the same prompts again and again


class ClapScorer(Scorer):
    """Compares the embedding of a sound with that of its prompt: score = cosine, in [-1, 1].

    Of a sound over 10 seconds a model without fusion hears one cut of 10 seconds, one with fusion the whole, squeezed,
    and a cut of each third. The official code cuts at random; the card's `preprocess.crop` says where we do: `seeded`,
    at places drawn by the hash of the file's content, or `centre`.
    """

    def __init__(self, card: Card, model: nn.Module, tokenizer: Any, device: str | torch.device) -> None:
        self.card, self.device = card, torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fusion = model.config.audio_config.enable_fusion
        self.crop = card.preprocess.get("crop", CROPS[0])
        self.preparation = ("clap", self.fusion, self.crop)
        self.embed = lru_cache(REMEMBERED_PROMPTS)(self.embed)

    def prepare(self, medium: Any, *, condition: Sequence = (), name: str = "") -> tuple[Tensor, bool]:
        """What `features` gives of a sound: a `Sound`, a path, or a file's bytes."""
        wave, content = sound_of(medium, RATE_HZ, mono=True, name=name)
        return features(wave[0], fusion=self.fusion, seed=content if self.crop == "seeded" else None)

    def judge(self, prepared: Sequence[tuple[Tensor, bool]], prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `Scorer.judge`."""
        mels, longer = zip(*prepared, strict=True)
        mels, longer = torch.stack(mels).to(self.device), torch.tensor(longer, device=self.device)
        audio = self.model.get_audio_features(mels, is_longer=longer).pooler_output
        return {"score": F.cosine_similarity(audio, torch.cat([self.embed(prompt) for prompt in prompts]))}

    def embed(self, prompt: str) -> Tensor:
        """[1, D]; alone and unpadded, so that it does not depend on other prompts at all."""
        tokens = self.tokenizer(prompt, truncation=True, max_length=TOKENS, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**tokens).pooler_output


def load(card: Card, device: str | torch.device = "cpu") -> ClapScorer:
    """Builds the scorer of a card of family clap: `model: {transformers: FOLDER or hub id}`."""
    from transformers import AutoTokenizer, ClapModel

    where, source = card.folder / "card.yaml", str(card.model.get("transformers") or "")
    if not source:
        raise UserError(f"{where}: model needs `transformers: FOLDER` or a hub id, such as laion/clap-htsat-unfused.")
    if card.preprocess.keys() - {"crop"} or card.preprocess.get("crop", CROPS[0]) not in CROPS:
        raise UserError(f"{where}: preprocess takes `crop: {' | '.join(CROPS)}` alone; the rest is CLAP's own.")
    source = str(card.path(source)) if card.path(source).is_dir() else source
    try:
        model, told = ClapModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a hub has a dozen exception types for absent, gated and offline
        raise UserError(
            f"{source}: the CLAP model of {card.name!r} cannot be loaded ({str(error).strip().splitlines()[0]}); "
            "check the name and the connection, or name a local folder in its card."
        ) from error
    if told["missing_keys"]:
        raise UserError(f"{source}: is no whole CLAP, it lacks {min(told['missing_keys'])}; fetch it again.")
    return ClapScorer(card, model, tokenizer, device)


def features(wave: np.ndarray, *, fusion: bool, seed: bytes | None = None) -> tuple[Tensor, bool]:
    """What the audio tower takes.

    Args:
        wave: [T] samples at 48 kHz; those beyond [-1, 1] are clipped.
        fusion: Of the models with fusion.
        seed: Draws the places of the cuts of a long sound; None: the middle of where they may lie.

    Returns:
        Log-mel spectrogram in dB, [1, 1001, 64], or with fusion [4, 1001, 64]; and whether fusion has parts to fuse.

    Deviation: the whole is squeezed without antialiasing, as torchvision did (below 0.17) when CLAP was trained.
    """
    draw = Random(seed).randint if seed is not None else (lambda low, high: (low + high) // 2)
    wave = ((wave.clip(-1, 1) * 32767).astype(np.int16) / 32767).astype(np.float32)
    spare = len(wave) - SAMPLES
    if spare <= 0:
        wave = np.tile(wave, SAMPLES // len(wave))
        wave = np.pad(wave, (0, SAMPLES - len(wave)))
    elif not fusion:
        start = draw(0, spare)
        wave = wave[start : start + SAMPLES]
    mel = log_mel(wave, fusion=fusion)
    if not fusion:
        return mel[None], False
    if len(mel) == FRAMES:
        return mel.expand(4, -1, -1), False
    thirds = [part if len(part) else [0] for part in np.array_split(np.arange(len(mel) - FRAMES + 1), 3)]
    cuts = [mel[start:][:FRAMES] for start in (draw(int(part[0]), int(part[-1])) for part in thirds)]
    whole = F.interpolate(mel[None, None], (FRAMES, MELS), mode="bilinear", align_corners=False)[0, 0]
    return torch.stack([whole, *cuts]), True


def log_mel(wave: np.ndarray, *, fusion: bool) -> Tensor:
    """float32 [T] at 48 kHz -> log-mel spectrogram in dB, float32 [1 + T // 480, 64].

    10 log10(max(power, 1e-10)), power summed under the filters of `filters`. In float64, because beside a pure tone the
    rounding of float32 costs up to 1.5 dB.
    """
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(wave).double(), WINDOW, HOP, window=window, return_complex=True)
    power = filters(fusion).T @ spectrum.abs().square()
    return 10 * power.clamp(min=1e-10).log10().T.float()


@cache
def filters(fusion: bool) -> Tensor:
    """[513, 64] weights of the mel bands, 50 to 14000 Hz.

    The models were trained so: without fusion as librosa (slaney scale and norm), with it as torchaudio (HTK, no norm).
    """
    from transformers.audio_utils import mel_filter_bank

    scale, norm = ("htk", None) if fusion else ("slaney", "slaney")
    bank = mel_filter_bank(WINDOW // 2 + 1, MELS, 50.0, 14_000.0, RATE_HZ, norm=norm, mel_scale=scale)
    return torch.from_numpy(bank).double()
