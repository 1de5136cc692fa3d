"""PPD with user layers on SDXL 1.0, for one card of 40 GB or more: an extension of ours.

    mmalign user make --pairs DATA --encoder llava-hf/llava-onevision-qwen2-7b-ov-hf --output users.safetensors
    mmalign train sdxl_ppd --dataset-name DATA --users users.safetensors --output-dir sdxl-ppd
    mmalign compare stabilityai/stable-diffusion-xl-base-1.0 sdxl-ppd --user SOMEBODY

DATA is Pick-a-Pic v2 (its user_id names the user), or a folder or parquet files whose comparisons name theirs.
The paper (arXiv 2501.06655) trained stage C of Stable Cascade and has no SDXL experiment: there is no published figure
to aim at. It reports 76 % of votes over Stable Cascade for users known from four examples. This has not been run on
real SDXL weights here; the effect was measured on the embedded model alone (benchmarks/personal.md).
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
"""

from mmalign.objectives import PPD
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
        # The stock VAE overflows in half precision; the published trainers take this one
        pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",
        dataset_name="pickapic",
        output_dir="sdxl-ppd",
        resolution=1024,
        # The paper's beta is not published: this is Diffusion-DPO's for SDXL (arXiv 2311.12908 section 5.1)
        objective=PPD(beta=5000),
        users="users.safetensors",
        # Ours: the paper's tokens are not published; 4 is IP-Adapter's (arXiv 2308.06721)
        user_tokens=4,
        # The paper drops users at random; its share is not published
        user_dropout=0.1,
        # AdamW, 1e-5, 768 pairs a step, 1 epoch of 0.8 million pairs: paper
        learning_rate=1e-5,
        lr_scheduler="constant",
        train_batch_size=1,
        gradient_accumulation_steps=768,
        max_train_steps=1040,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        checkpointing_steps=100,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        validation_prompts=(
            "a red fox in the snow, oil painting",
            "portrait of an old fisherman, 85mm photograph",
        ),
        validation_steps=100,
        seed=0,
    )
