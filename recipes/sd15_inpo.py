"""InPO on Stable Diffusion 1.5 with a LoRA, for one card of 12 GB or more.

    mmalign train sd15_inpo --dataset-name DATA --lora SFT --output-dir sd15-inpo

DATA as for sdxl_inpo. The paper starts from a model fine-tuned on the winners, which is then the reference as well:
SFT is a LoRA trained with `mmalign train sd15_diffusion_dpo --objective SFT`.
Aimed at: arXiv 2503.18454, a full fine-tune of 400 steps. This LoRA has not been run on real SD1.5 weights here: the
arithmetic is held against the official numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
Everything that is not named below is as in sd15_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import InPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import DDIMInversion
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sd15_diffusion_dpo"),
        output_dir="sd15-inpo",
        # beta 2000, 10 inversion steps with eta 0.1: JaydenLyh/InPO @ a9cfc4de train.py:875, 955-1053 and its launcher
        objective=InPO(beta=2000, draw=DDIMInversion(steps=10, eta=0.1)),
        # 400 steps of 1024 pairs there, at an effective 1.024e-5
        max_train_steps=400,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=200,
        gradient_accumulation_steps=256,
        learning_rate=1.024e-5,
        checkpointing_steps=50,
        validation_steps=50,
    )
