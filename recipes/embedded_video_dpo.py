"""Diffusion-DPO with a LoRA on the embedded video model: the recipe that `mmalign quickstart --modality video` runs.

    mmalign quickstart --modality video
    mmalign train embedded_video_dpo --dataset-name quickstart/pairs --output-dir my-run

Aimed at: no table of a paper; the effect is measured in benchmarks/README.md.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts (benchmarks/README.md), not on the prompts that the report shows.
"""

from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path=str(path("t2v")),
        dataset_name="quickstart/pairs",
        output_dir="quickstart/aligned",
        objective=DiffusionDPO(beta=500),
        max_train_steps=60,
        learning_rate=3e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        cache_latents=True,
        checkpointing_steps=60,
        seed=0,
    )
