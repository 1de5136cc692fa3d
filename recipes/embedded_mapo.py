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
        # A larger T, as the embedded model's errors differ little within a pair
        objective=MaPO(T=40_000.0, draw=FreshNoise(low=0.5)),
    )
