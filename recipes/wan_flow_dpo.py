"""Flow-DPO on Wan 2.1 (1.3B) with a LoRA: DiffusionDPO on a rectified flow of videos. For one card of 80 GB.

    mmalign train wan_flow_dpo --dataset-name DATA --output-dir wan-flow-dpo

DATA is a folder with comparisons.jsonl whose media are videos, or parquet files. Videos have 33 frames at 16 a second
(2.1 seconds) or are longer; of longer ones the beginning is taken.
Source: arXiv 2501.13918 (VideoAlign), whose Flow-DPO aligned a video model that is not public. Its code came out in
yifan123/flow_grpo @ ac4c86e for SD3.5; the constants that are not of pictures are taken from there, as sd3_flow_dpo
says. Size, length and batch are ours. Not run on real Wan weights here: the arithmetic is held against the official
numbers, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
"""

from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        dataset_name="videos",
        output_dir="wan-flow-dpo",
        # 832 x 480 is what the model was made for; a third of its 81 frames is ours, for memory and time
        resolution=480,
        num_frames=33,
        # beta 100: flow_grpo config/dpo.py, for means over elements, as ours are
        objective=DiffusionDPO(beta=100),
        # Rank 32, alpha 64: flow_grpo scripts/train_sd3_dpo.py:389
        rank=32,
        lora_alpha=64,
        # As sd3_flow_dpo: Flow-Factory's, after larger ones collapsed
        learning_rate=1e-5,
        lr_scheduler="constant",
        adam_weight_decay=1e-4,
        max_grad_norm=1.0,
        # 16 pairs a step and 2000 steps are ours
        train_batch_size=1,
        gradient_accumulation_steps=16,
        max_train_steps=2000,
        gradient_checkpointing=True,
        checkpointing_steps=250,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        validation_prompts=(
            "a red fox runs through the snow",
            "an old fisherman casts his net from a boat",
        ),
        validation_steps=500,
        seed=0,
    )
