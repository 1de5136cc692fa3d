"""Diffusion-DPO on CogVideoX 5b with a LoRA, for one card of 80 GB.

    mmalign train cogvideox_diffusion_dpo --dataset-name DATA --output-dir cogvideox-dpo

DATA is a folder with comparisons.jsonl whose media are videos, or parquet files. Videos have 49 frames at 8 a second
(6.1 seconds) or are longer; of longer ones the beginning is taken.
Source: Hongyang-Du/VideoGPA @ ce07a88, train_dpo/CogVideoX-T2V-5B_lora/03_train.py, which compares the errors of the
velocity, without weights, under one noise and timestep a pair, as ours does. Its beta is 1, but the file that reduces
the error is not public; beta is therefore VideoDPO's (arXiv 2412.14167), which was made for the noise of another model.
Not run on real CogVideoX weights here: the arithmetic is held against the official numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
"""

from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="THUDM/CogVideoX-5b",
        dataset_name="videos",
        output_dir="cogvideox-dpo",
        # 720 x 480 and 49 frames: the model's own
        resolution=480,
        num_frames=49,
        # beta_dpo 5000: configs/dpo/config.yaml of VideoDPO's code (shijiew555/VideoDPO @ 7ab83ff), for VideoCrafter 2
        objective=DiffusionDPO(beta=5000),
        # Rank 64, alpha 128, attention projections; 5e-6 after 500 steps, with a cosine to 10000: VideoGPA
        rank=64,
        lora_alpha=128,
        learning_rate=5e-6,
        lr_scheduler="cosine",
        lr_warmup_steps=500,
        max_train_steps=10_000,
        # 8 cards x 2 accumulated, norm 1.0: VideoGPA
        train_batch_size=1,
        gradient_accumulation_steps=16,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        checkpointing_steps=500,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        validation_prompts=(
            "a red fox runs through the snow",
            "an old fisherman casts his net from a boat",
        ),
        validation_steps=1000,
        seed=0,
    )
