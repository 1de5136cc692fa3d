"""RankDPO on SDXL 1.0 with a LoRA, for one card of 24 GB or more.

    mmalign train sdxl_rankdpo --dataset-name DATA --output-dir sdxl-rankdpo

DATA is a folder with comparisons.jsonl or parquet files of ranked lists, each picture's score in [0, 1] the share of
comparisons that it won (mmalign.data.label.ranked): four models' pictures and five scorers in the paper.
Aimed at: arXiv 2410.18013 (SDXL: GenEval 0.55 to 0.61, DPG-Bench 74.65 to 79.26), a full fine-tune with batches of
1024 lists. This LoRA has not been run on real SDXL weights here: the arithmetic is held against numbers derived from
the paper (no code was released), the effect is not.
Expected curve: loss downwards from ln 2 times the mean sum of a list's weights.
Everything that is not named below is as in sdxl_diffusion_dpo, so that methods can be compared.
"""

from dataclasses import replace

from mmalign.objectives import RankDPO
from mmalign.recipe import load_recipe
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_diffusion_dpo"),
        output_dir="sdxl-rankdpo",
        # beta, learning rate and optimizer are not in the paper: Diffusion-DPO's
        objective=RankDPO(beta=5000),
        # 400 steps of 1024 lists of four there
        max_train_steps=400,
        gradient_accumulation_steps=128,
        checkpointing_steps=50,
        validation_steps=50,
        # A list of four fits where a pair does
        backward="two-pass",
        rows_at_once=2,
    )
