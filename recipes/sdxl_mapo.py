"""MaPO on SDXL 1.0 with a LoRA, for one card of 24 GB or more.

    mmalign train sdxl_mapo --dataset-name DATA --output-dir sdxl-mapo

DATA is a folder with comparisons.jsonl, parquet files, or a hub id, with the columns of Pick-a-Pic or ours.
Aimed at: arXiv 2406.06424 table 2 (SDXL on Pick-a-Pic v2: Aesthetic 6.34, HPSv2.1 31.2, PickScore 22.9), a full fine-
tune. This LoRA has not been run on real SDXL weights here: the arithmetic is held against the official numbers, the
effect is not.
Expected curve: loss from the mean squared error + 0.069 downwards; winner's error falls, margin rises.
Everything that is not named below is as in sdxl_diffusion_dpo, so that methods can be compared.
"""

from dataclasses import replace

from mmalign.objectives import MaPO
from mmalign.recipe import load_recipe
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_diffusion_dpo"),
        output_dir="sdxl-mapo",
        # beta 0.1, snr 0.5, T 1000: defaults of mapo-t2i/mapo @ 374b3d3d. The paper (v2, table 4) has one beta, 8 for
        # general preference: objective=MaPO.paper(beta=8)
        objective=MaPO(beta=0.1, snr=0.5, T=1000.0),
        # 8 x 2 pairs a step, LoRA rank 8, 1e-5 constant, 2000 steps: its README. The paper's full fine-tune: 2048
        # pairs, 1e-7 with a cosine
        train_batch_size=1,
        gradient_accumulation_steps=16,
        rank=8,
        learning_rate=1e-5,
        max_train_steps=2000,
        # No prompt dropout there
        proportion_empty_prompts=0.0,
    )
