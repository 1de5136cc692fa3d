"""MaPO with a LoRA on the embedded model.

    mmalign train embedded_mapo --dataset-name quickstart/pairs --output-dir my-run

The pairs are those that `mmalign quickstart` makes; no reference is asked.
Aimed at: no table of a paper; benchmarks/methods.md has all methods side by side.
Expected curve: margin upwards.
The numbers were chosen on development prompts; what is not named is as in embedded_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import MaPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import FreshNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("embedded_diffusion_dpo"),
        output_dir="embedded-mapo",
        # The released code's three constants
        objective=MaPO(beta=0.1, snr=0.5, T=1000.0, draw=FreshNoise(low=0.5)),
        # An eighth of Diffusion-DPO's: without a reference nothing holds the model back, and faster it loses the text
        learning_rate=2.5e-5,
    )
