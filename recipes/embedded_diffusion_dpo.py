"""Diffusion-DPO with a LoRA on the embedded model: the recipe that `mmalign quickstart` runs.

    mmalign quickstart                                # makes the pairs, trains, compares
    mmalign train embedded_diffusion_dpo --dataset-name quickstart/pairs --output-dir my-run

Aimed at: no table of a paper; the effect is measured in benchmarks/README.md.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts (benchmarks/README.md), not on the prompts that the report shows.
"""

from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import FreshNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path=str(path()),
        dataset_name="quickstart/pairs",
        output_dir="quickstart/aligned",
        # Small latents at low noise hold detail, no preference: their large errors drown what the pairs differ in
        objective=DiffusionDPO(beta=20_000, draw=FreshNoise(low=0.5)),
        max_train_steps=60,
        learning_rate=2e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        lora_targets=("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "ff.net.0.proj", "ff.net.2"),
        cache_latents=True,
        checkpointing_steps=60,
        seed=0,
    )
