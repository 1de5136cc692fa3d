"""InPO on PixArt-Sigma (1024 pixels) with a LoRA, for one card of 24 GB or more.

    mmalign train pixart_inpo --dataset-name DATA --output-dir pixart-inpo

DATA is a folder with comparisons.jsonl, parquet files, or a hub id, with the columns of Pick-a-Pic or ours.
An extension: arXiv 2503.18454 has SD1.5 and SDXL alone. PixArt-Sigma predicts the same epsilon on another schedule
(linear betas), so the inversion is the same; beta is SDXL's. The LoRA is in PEFT's format: diffusers reads none for
PixArt. Not run on real PixArt weights here: the arithmetic is held against the official numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
Everything that is not named below is as in sdxl_inpo, so that methods can be compared.
"""

from dataclasses import replace

from mmalign.recipe import load_recipe
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_inpo"),
        pretrained_model_name_or_path="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        pretrained_vae_model_name_or_path=None,
        output_dir="pixart-inpo",
        # Rank 16, 1e-5: asset/docs/pixart_lora.md of PixArt-alpha/PixArt-sigma
        rank=16,
        learning_rate=1e-5,
    )
