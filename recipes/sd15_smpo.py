"""SmPO on Stable Diffusion 1.5 with a LoRA, for one card of 12 GB or more.

    mmalign train sd15_smpo --dataset-name DATA --lora SFT --output-dir sd15-smpo

DATA as for sdxl_smpo. The paper starts from a model fine-tuned on the winners, which is then the reference as well:
SFT is a LoRA trained with `mmalign train sd15_diffusion_dpo --objective SFT`.
Aimed at: the project's table (PickScore 22.08, HPSv2.1 29.31, ImageReward 0.885), a full fine-tune of 200 steps. This
LoRA has not been run on real SD1.5 weights here: the arithmetic is held against the official numbers, the effect is
not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
Everything that is not named below is as in sd15_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import SmPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import ReNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sd15_diffusion_dpo"),
        output_dir="sd15-smpo",
        # beta 2000, gamma 10, 5 ReNoise steps: JaydenLyh/SmPO @ 8922d54f train.py:881 and its launcher
        objective=SmPO(beta=2000, gain=10.0, draw=ReNoise(steps=5)),
        # Lowest and highest PickScore of Pick-a-Pic v2, as the official code has them (train.py:739-747)
        score_scale=(0.11543526500463486, 0.28201571106910706),
        # 200 steps of 1024 pairs there, at an effective 1.024e-5
        max_train_steps=200,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=100,
        gradient_accumulation_steps=256,
        learning_rate=1.024e-5,
        checkpointing_steps=50,
        validation_steps=50,
    )
