"""SmPO on SDXL 1.0 with a LoRA, for one card of 24 GB or more.

    mmalign train sdxl_smpo --dataset-name DATA --output-dir sdxl-smpo

DATA is a folder with comparisons.jsonl or parquet files whose scores are PickScore cosines: the scores decide which
of two pictures is preferred, and how much.
Aimed at: the project's table (HPDv2 test, medians: PickScore 23.62, HPSv2.1 32.53, ImageReward 1.331, Aesthetic
6.264), a full fine-tune with batches of 1024 pairs. This LoRA has not been run on real SDXL weights here: the
arithmetic is held against the official numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
Everything that is not named below is as in sdxl_diffusion_dpo, so that methods can be compared.
"""

from dataclasses import replace

from mmalign.objectives import SmPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import ReNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_diffusion_dpo"),
        output_dir="sdxl-smpo",
        # beta 5000, gamma 10, 10 ReNoise steps under the policy: JaydenLyh/SmPO @ 8922d54f train.py:872, 999-1065
        objective=SmPO(beta=5000, gain=10.0, draw=ReNoise(steps=10)),
        # Lowest and highest PickScore of Pick-a-Pic v2, as the official code has them (train.py:739-747)
        score_scale=(0.11543526500463486, 0.28201571106910706),
        # 200 steps, warm-up 100 there, with 1024 pairs a step (8 GPUs x 128) at an effective 1.024e-5
        max_train_steps=200,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=100,
        gradient_accumulation_steps=128,
        learning_rate=1.024e-5,
        checkpointing_steps=50,
        validation_steps=50,
    )
