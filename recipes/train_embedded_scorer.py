"""Four aspect heads on the frozen embedded-clip: how the bundled embedded-aspects was trained.

    python benchmarks/train_aspects.py pictures --output DIR
    python benchmarks/train_aspects.py data --output DIR
    mmalign train-scorer train_embedded_scorer --dataset-name DIR/fit-0 --output-dir DIR/scorer-0

Aimed at: no table of a paper; figures are in benchmarks/train_aspects.md.
Expected curve: loss from about ln 2 = 0.69 (four aspects, bradley_terry) downwards; a few minutes on one CPU thread,
most of them for the features, which are computed once.
The numbers were chosen on development prompts.
"""

from mmalign.scoring.fit import ScorerRun


def recipe() -> ScorerRun:
    """The run."""
    return ScorerRun(
        scorer="embedded-clip",
        dataset_name="aspects/fit-0",
        output_dir="embedded-aspects",
        loss="bradley_terry",
        head="silu2",
        aspects=("prompt-following", "aesthetic", "fidelity", "harmlessness"),
        taps=("act1", "act3", "layer1"),  # the layers that still see a picture's finish
        max_train_steps=600,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        train_batch_size=32,
        checkpointing_steps=600,
        seed=0,
    )
