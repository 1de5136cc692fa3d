"""Diffusion-DPO with a LoRA on the embedded audio model, which is trained too little to show a gain yet.

    python benchmarks/align_embedded.py develop --modality audio --output DIR --betas 500 --steps 60

Aimed at: no table of a paper; Tango 2 (arXiv 2404.09956) is the like at full size.
The numbers are not chosen. On development prompts the held-out judge saw no effect of DPO on 77 pairs of the model's
own sounds (52.1 %, 95 % 42.9 to 60.8, n = 120), of true sounds against its worst (58.3 %, 47.9 to 67.7, n = 96), or of
SFT on those (51.6 %, 41.7 to 60.9, n = 96). No test prompt has been looked at.
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
        objective=DiffusionDPO(beta=2000, draw=FreshNoise(low=0.3)),
        max_train_steps=60,
        learning_rate=5e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        lora_targets=("to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        cache_latents=True,
        checkpointing_steps=60,
        seed=0,
    )
