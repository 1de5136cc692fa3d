"""SmPO with a LoRA on the embedded model.

    mmalign train embedded_smpo --dataset-name quickstart/pairs --output-dir my-run

The pairs are those that `mmalign quickstart` makes, with the scores of embedded-hps.
Aimed at: no table of a paper; benchmarks/methods.md has all methods side by side.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts; what is not named is as in embedded_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import SmPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import ReNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("embedded_diffusion_dpo"),
        output_dir="embedded-smpo",
        objective=SmPO(beta=20_000, gain=10.0, draw=ReNoise(steps=5, low=0.75)),
        learning_rate=1e-4,
        # Lowest and highest score of embedded-hps among candidates for development prompts
        score_scale=(4.2, 13.6),
    )
