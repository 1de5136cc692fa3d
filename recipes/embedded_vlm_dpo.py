"""DPO with a LoRA on the embedded vision-language model, which sees what is in a picture and often says something else.

    mmalign quickstart --modality vlm                 # makes the pairs, trains, compares
    mmalign train embedded_vlm_dpo --dataset-name quickstart/pairs --output-dir my-run

Aimed at: no table of a paper; the effect is measured in benchmarks/embedded_vlm.md.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
The numbers were chosen on development pictures (benchmarks/embedded_vlm.md), not on those that the report shows.
"""

from mmalign.embedded import path
from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path=str(path("vlm")),
        dataset_name="quickstart/pairs",
        output_dir="quickstart/aligned",
        objective=DiffusionDPO(beta=0.1),
        max_train_steps=60,
        learning_rate=5e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        train_batch_size=16,
        rank=16,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        cache_latents=True,
        checkpointing_steps=60,
        seed=0,
    )
