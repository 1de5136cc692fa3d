"""Tiny models in the real layouts, built here from configurations; random weights, a second each."""

from __future__ import annotations

import json
from pathlib import Path

import torch

MERGES = [("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]


def write_tokenizer(folder: Path):
    """A CLIP tokenizer with single letters and four merges."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    return tokenizer, len(symbols)


def text_config(vocabulary: int, width: int, projection: int | None):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def unet_config(*, xl: bool, sample_size: int = 8):
    shared = {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24 if xl else 8,
    }
    if xl:
        shared |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 16,
            "use_linear_projection": True,
        }
    return shared


def tiny_pipeline(folder: Path, *, xl: bool, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Saves a StableDiffusion(XL)Pipeline of about 60 thousand parameters; pictures of 16 pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, vocabulary = write_tokenizer(folder / "tokenizer")
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=16,
            scaling_factor=0.7,
        )
        parts = {
            "unet": UNet2DConditionModel(**unet_config(xl=xl)),
            "vae": vae,
            "scheduler": scheduler,
            "tokenizer": tokenizer,
            "text_encoder": CLIPTextModel(text_config(vocabulary, 8, None)),
        }
        if xl:
            parts["tokenizer_2"] = tokenizer
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(vocabulary, 16, 16))
            pipeline = StableDiffusionXLPipeline(**parts)
        else:
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipeline.save_pretrained(folder)
    return folder
