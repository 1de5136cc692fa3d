"""InPO on SDXL 1.0 with a LoRA, for one card of 24 GB or more.

    mmalign train sdxl_inpo --dataset-name DATA --output-dir sdxl-inpo

DATA is a folder with comparisons.jsonl, parquet files, or a hub id, with the columns of Pick-a-Pic or ours.
Aimed at: the SDXL row that arXiv 2406.06424 v2 table 2 measured on the authors' checkpoint (Aesthetic 6.14, HPSv2.1
30.2, PickScore 22.5), a full fine-tune with batches of 1024 pairs. This LoRA has not been run on real SDXL weights
here: the arithmetic is held against the official numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
Everything that is not named below is as in sdxl_diffusion_dpo, so that methods can be compared.
"""

from dataclasses import replace

from mmalign.objectives import InPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import DDIMInversion
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_diffusion_dpo"),
        output_dir="sdxl-inpo",
        # beta 5000, 10 inversion steps with eta 0.1 under the policy: JaydenLyh/InPO @ a9cfc4de train.py:866, 955-1053
        objective=InPO(beta=5000, draw=DDIMInversion(steps=10, eta=0.1)),
        # 400 steps, warm-up 200 there, with 1024 pairs a step (8 GPUs x 128) at an effective 1.024e-5
        max_train_steps=400,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=200,
        gradient_accumulation_steps=128,
        learning_rate=1.024e-5,
        checkpointing_steps=50,
        validation_steps=50,
    )
