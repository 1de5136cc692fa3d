"""VisionPrefer's whole way on the embedded model: aspects, comparisons, a four-aspect scorer, alignment with it.

    mmalign generate embedded --prompts embedded:pairs --limit 320 --num 4 --output-dir judged
    mmalign score judged --scorer embedded-aspects --aspects
    mmalign pairs judged --mode all --output-dir judged-pairs
    mmalign train-scorer train_embedded_scorer --dataset-name judged-pairs --output-dir vp-score --head linear
    mmalign score judged --scorer vp-score/scorer --output vp-scores.parquet
    mmalign pairs judged --scores vp-scores.parquet --output-dir vp-pairs
    mmalign train visionprefer_embedded
    mmalign compare embedded vp-aligned --scorer vp-score/scorer --scorer embedded-heldout --scorer embedded-clip

The paper's annotator is GPT-4V; here embedded-aspects stands in for it in the second line, as no vision-language model
is bundled. With one, that line is `mmalign annotate judged --model HUB_ID`. So this shows that the way can be walked,
not that an AI's marks are good.
Aimed at: no table of a paper. Expected curve: as embedded_diffusion_dpo, whose numbers these are.
"""

from dataclasses import replace

from mmalign.recipe import load_recipe
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return replace(load_recipe("embedded_diffusion_dpo"), dataset_name="vp-pairs", output_dir="vp-aligned")
