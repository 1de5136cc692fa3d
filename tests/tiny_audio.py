"""Tiny sound models in the real pipelines' layouts; random weights, a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mmalign.media import make_sound
from mmalign.records import Comparison
from tests.tiny import t5_tokenizer

RATE = 16_000


def roberta_tokenizer():
    """A RoBERTa tokenizer of single bytes."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import RobertaTokenizerFast

    symbols = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return RobertaTokenizerFast(vocab=vocabulary, merges=[], model_max_length=24), len(symbols)


def t5(width: int):
    """A T5 encoder and its tokenizer of 32 letters."""
    from transformers import T5Config, T5EncoderModel

    tokenizer, symbols = t5_tokenizer()
    tokenizer.model_max_length = 32
    config = T5Config(vocab_size=symbols, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def clap(symbols: int):
    """A CLAP of width 8, and its feature extractor."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    text = {
        "vocab_size": symbols,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    sound = {
        "spec_size": 8,
        "num_mel_bins": 8,
        "window_size": 4,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embeds_hidden_size": 4,
        "hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=sound, projection_dim=8)), ClapFeatureExtractor()


def vocoder():
    """A HiFi-GAN with the published rates, loud enough to be heard in 16 bits."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=RATE,
        upsample_initial_channel=32,
        upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    made = SpeechT5HifiGan(config)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter, gain=2.0)
    return made


def tiny_audioldm2(folder: Path, *, seed: int = 0, t5_width: int = 16) -> Path:
    """Saves an AudioLDM2Pipeline whose mel frames are the real ones: 16 kHz, 64 bins, 10 ms; 0.32 seconds."""
    from diffusers import (
        AudioLDM2Pipeline,
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
        AutoencoderKL,
        DDIMScheduler,
    )
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = roberta_tokenizer()
        text_encoder, feature_extractor = clap(symbols)
        text_encoder_2, tokenizer_2 = t5(t5_width)
        sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
        language_model = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=8, bos_token_id=0, eos_token_id=0))
        language_model.config.max_new_tokens = 8
        AudioLDM2Pipeline(
            unet=AudioLDM2UNet2DConditionModel(
                sample_size=8,
                in_channels=8,
                out_channels=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=((None, 16, t5_width),) * 2,  # itself, GPT-2, T5: as the published ones
            ),
            scheduler=DDIMScheduler(
                beta_start=0.0015,
                beta_end=0.0195,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            vae=AutoencoderKL(
                in_channels=1,
                out_channels=1,
                latent_channels=8,
                block_out_channels=(4, 4, 4),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                norm_num_groups=2,
                layers_per_block=1,
                scaling_factor=0.9,
            ),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            feature_extractor=feature_extractor,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            projection_model=AudioLDM2ProjectionModel(
                text_encoder_dim=8, text_encoder_1_dim=t5_width, langauge_model_dim=16
            ),
            language_model=language_model,
            vocoder=vocoder(),
        ).save_pretrained(folder)
    return folder


def tiny_stable_audio(folder: Path, *, seed: int = 0) -> Path:
    """Saves a StableAudioPipeline: stereo at 16 kHz, 320 samples a latent, up to 0.32 seconds."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder, tokenizer = t5(16)
        StableAudioPipeline(
            transformer=StableAudioDiTModel(
                sample_size=16,
                in_channels=8,
                out_channels=8,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                num_key_value_attention_heads=1,
                cross_attention_dim=16,
                cross_attention_input_dim=16,
                global_states_input_dim=32,
                time_proj_dim=8,
            ),
            # The published scheduler, CosineDPMSolverMultistepScheduler, needs torchsde
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_min=0.3,
                sigma_max=500,
                sigma_data=1.0,
                sigma_schedule="exponential",
                prediction_type="v_prediction",
            ),
            vae=AutoencoderOobleck(
                encoder_hidden_size=16,  # mean and deviation of 8 channels
                downsampling_ratios=[4, 8, 10],
                channel_multiples=[1, 2, 2],
                decoder_channels=4,
                decoder_input_channels=8,
                audio_channels=2,
                sampling_rate=RATE,
            ),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            projection_model=StableAudioProjectionModel(
                text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=512
            ),
        ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {"AudioLDM2": tiny_audioldm2, "Stable Audio": tiny_stable_audio}
SETTINGS: dict[str, dict] = {name: {"num_inference_steps": 3, "guidance_scale": 3.0} for name in FAMILIES}


def wave(number: int, seconds: float = 0.3, *, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """[channels, T] float32: two tones that fade, and a little noise; sounds of other numbers differ clearly."""
    rng, t = np.random.default_rng(number), np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * rng.uniform(200, 3000) * t + k) * np.exp(-t * rng.uniform(0, 9)) for k in range(2)]
    made = [0.3 * tones[0] + 0.2 * tones[k % 2] + 0.02 * rng.standard_normal(len(t)) for k in range(channels)]
    return np.stack(made).astype(np.float32)


def comparisons(k: int) -> list[Comparison]:
    """Four lists of k sounds of two users."""
    return [
        Comparison(
            id=f"sounds-{i}",
            prompt=["a dog barks then rain", "rain"][i % 2],
            media=tuple(make_sound(wave(k * i + j, 0.2 + 0.05 * (j % 3)), RATE) for j in range(k)),
            score=tuple((j + i) % k / (k - 0.5) for j in range(k)),
            user=f"user-{i % 2}",
        )
        for i in range(4)
    ]
