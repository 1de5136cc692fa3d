"""MaPO on FLUX.1 dev with a LoRA, for one card of 48 GB: the plan counts 26 GiB, as the encoders run first.

    mmalign train flux_mapo --dataset-name DATA --output-dir flux-mapo

DATA is a folder with comparisons.jsonl, parquet files, or a hub id, with the columns of Pick-a-Pic or ours.
An extension: arXiv 2406.06424 has no flow model. Its constants are for errors of the noise; the velocity's are larger,
by 1 / (1 - t)^2, so T and snr, which multiply them, may want to be smaller. MaPO asks no reference: no second forward
of the 12 billion weights. Not run on real FLUX weights here.
Expected curve: loss from the mean squared error + 0.069 downwards; winner's error falls, margin rises.
Everything that is not named below is as in sdxl_mapo.
"""

from dataclasses import replace

from mmalign.recipe import load_recipe
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(
        load_recipe("sdxl_mapo"),
        pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
        pretrained_vae_model_name_or_path=None,
        output_dir="flux-mapo",
        # T5 and CLIP are another 5 billion weights, which training from a cache does without
        cache_dir="cache/flux",
    )
