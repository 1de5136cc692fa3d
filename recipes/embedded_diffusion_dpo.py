"""Diffusion-DPO with a LoRA on the embedded model: the recipe that `mmalign quickstart` runs.

    mmalign quickstart                                # makes the pairs, trains, compares
    mmalign train embedded_diffusion_dpo --dataset-name quickstart/pairs --output-dir my-run

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
        pretrained_model_name_or_path=str(path()),
        dataset_name="quickstart/pairs",
        output_dir="quickstart/aligned",
        objective=DiffusionDPO(beta=2000),
        max_train_steps=120,
        learning_rate=5e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        lora_targets=("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2"),
        cache_latents=True,
        checkpointing_steps=120,
        seed=0,
    )
