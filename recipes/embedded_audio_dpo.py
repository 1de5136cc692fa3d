"""Diffusion-DPO with a LoRA on the embedded audio model: true sounds against ones that miss or exchange events.

    mmalign quickstart --modality audio               # makes the pairs, trains, compares
    mmalign train embedded_audio_dpo --dataset-name quickstart/pairs --output-dir my-run

Aimed at: no table of a paper; the pairs are of the kind of Tango 2's (arXiv 2404.09956), the effect is measured in
benchmarks/embedded_audio.md.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development prompts (benchmarks/embedded_audio.md), not on those that the report shows.
"""

from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import FreshNoise
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path=str(path("t2a")),
        dataset_name="quickstart/pairs",
        output_dir="quickstart/aligned",
        # Which events there are is settled at high noise; at low noise only their detail is left
        objective=DiffusionDPO(beta=300, draw=FreshNoise(low=0.3)),
        max_train_steps=400,
        learning_rate=1e-3,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        lora_targets=("to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        cache_latents=True,
        checkpointing_steps=400,
        seed=0,
    )
