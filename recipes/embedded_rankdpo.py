"""RankDPO with a LoRA on the embedded model.

    mmalign train embedded_rankdpo --dataset-name DATA --output-dir my-run

DATA is ranked lists (mmalign.data.label.ranked); benchmarks/compare_methods.py makes them from four candidates each.
Aimed at: no table of a paper; benchmarks/methods.md has all methods side by side.
Expected curve: loss downwards from ln 2 times the mean sum of a list's weights.
The numbers were chosen on development prompts; what is not named is as in embedded_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import RankDPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import FreshNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("embedded_diffusion_dpo"),
        output_dir="embedded-rankdpo",
        objective=RankDPO(beta=20_000, draw=FreshNoise(shared=False, low=0.5)),
        # Eight lists of four are as many samples as sixteen pairs
        train_batch_size=8,
    )
