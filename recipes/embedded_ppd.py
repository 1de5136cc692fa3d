"""PPD with user layers on the embedded model: one model, a taste for each user.

    mmalign user make --pairs PAIRS --output users.safetensors
    mmalign train embedded_ppd --dataset-name PAIRS --users users.safetensors --output-dir my-run
    mmalign compare embedded my-run --user SOMEBODY

PAIRS is a folder whose comparisons name their user, four pairs each or more.
Aimed at: no table of a paper; the effect on simulated users is measured in benchmarks/personal.md.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts and users of their own (benchmarks/personal_embedded.py).
"""

from mmalign.embedded import path
from mmalign.objectives import PPD
from mmalign.surrogate import FreshNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path=str(path()),
        dataset_name="pairs",
        output_dir="embedded-ppd",
        # Small latents at low noise hold detail, no preference: their large errors drown what the pairs differ in
        objective=PPD(beta=40_000, draw=FreshNoise(low=0.5)),
        users="users.safetensors",
        user_tokens=4,
        user_dropout=0.1,
        max_train_steps=80,
        learning_rate=3e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        cache_latents=True,
        checkpointing_steps=80,
        seed=0,
    )
