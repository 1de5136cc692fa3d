"""InPO with a LoRA on the embedded model.

    mmalign train embedded_inpo --dataset-name quickstart/pairs --output-dir my-run

The pairs are those that `mmalign quickstart` makes; the model inverts them.
Aimed at: no table of a paper; benchmarks/methods.md has all methods side by side.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts; what is not named is as in embedded_diffusion_dpo.
"""

from dataclasses import replace

from mmalign.objectives import InPO
from mmalign.recipe import load_recipe
from mmalign.surrogate import DDIMInversion
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("embedded_diffusion_dpo"),
        output_dir="embedded-inpo",
        objective=InPO(beta=20_000, draw=DDIMInversion(steps=5, eta=0.1, low=0.5)),
    )
