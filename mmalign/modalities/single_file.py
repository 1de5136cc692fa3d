"""SD1.5 and SDXL from one original-format `.safetensors` file, without asking the hub.

diffusers' loader converts the weights but fetches the configurations; here they are, as published with
stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0. The tokenizer is OpenAI's CLIP BPE, which open_clip ships.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmalign.records import UserError

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
CLIP_L = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": 49408}
CLIP_L |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L |= {"projection_dim": 768, "hidden_act": "quick_gelu", "max_position_embeddings": 77}
CLIP_L |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
BIG_G = {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"}
BIG_G |= {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
BIG_G |= {"projection_dim": 1280}

SD15 = {
    "model_index": {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler": {"_class_name": "DDIMScheduler", **SCHEDULER},
    "text_encoder": CLIP_L,
    "unet": {
        **UNET,
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {**VAE, "sample_size": 512, "scaling_factor": 0.18215},
}
SDXL = {
    "model_index": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler": {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": False, **SCHEDULER},
    "text_encoder": CLIP_L,
    "text_encoder_2": BIG_G,
    "unet": {
        **UNET,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
}
MARKS = {  # a weight that only this family's file has
    "conditioner.embedders.1.model.ln_final.weight": SDXL,
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": SD15,
}


def configurations(path: Path) -> dict[str, Any]:
    """Those of the family that a file's weight names state; reads the header alone.

    Raises:
        UserError: it is no safetensors file, or of no family known here.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: pickled checkpoints can run code when loaded; convert it to .safetensors first.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({error}).") from error
    for mark, found in MARKS.items():
        if mark in names:
            return found
    raise UserError(f"{path}: is no SD1.5 or SDXL checkpoint in the original format; give a pipeline folder instead.")


def pipeline_class(path: Path) -> str:
    """The diffusers pipeline for a file."""
    return configurations(path)["model_index"]["_class_name"]


def tokenizer() -> Any:
    """OpenAI's CLIP tokenizer, 49,408 symbols, built from the merges in open_clip."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(symbol, symbol): number for symbol, number in source.encoder.items()}
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def write_configurations(folder: Path, parts: dict[str, Any]) -> None:
    """Lays configurations out as a pipeline folder."""
    (folder / "model_index.json").write_text(json.dumps(parts["model_index"]))
    for name in parts.keys() - {"model_index"}:
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(parts[name]))


def load_pipeline(path: Path, dtype: torch.dtype, config: str | Path | None = None) -> Any:
    """The diffusers pipeline of a single file.

    Args:
        path: the checkpoint.
        dtype: of its weights.
        config: a pipeline folder for a model of another size than the published ones.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    parts = configurations(path)
    kind = getattr(diffusers, parts["model_index"]["_class_name"])
    if config:
        shaped = DiffusionPipeline.load_config(str(config))
        names = [name for name in ("tokenizer", "tokenizer_2") if shaped.get(name)]
        from transformers import CLIPTokenizer

        own = {name: CLIPTokenizer.from_pretrained(str(config), subfolder=name) for name in names}
        return kind.from_single_file(str(path), config=str(config), local_files_only=True, torch_dtype=dtype, **own)
    own = {name: tokenizer() for name in parts["model_index"] if name.startswith("tokenizer")}
    with tempfile.TemporaryDirectory() as folder:
        write_configurations(Path(folder), parts)
        return kind.from_single_file(str(path), config=folder, local_files_only=True, torch_dtype=dtype, **own)
