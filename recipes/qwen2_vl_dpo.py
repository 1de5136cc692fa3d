"""DPO on Qwen2-VL 7B with a LoRA, for one card of 40 GB or more.

    mmalign train qwen2_vl_dpo --dataset-name DATA --output-dir qwen2-vl-dpo

DATA has the columns of TRL's vision data sets: images, prompt, chosen, rejected, as HuggingFaceH4/rlaif-v_formatted on
the hub or as lines of a .jsonl file beside its pictures. Other methods are one flag away, on scored lists of answers:
--objective SmPO, RankDPO or MMDPO with --objective.beta 0.1; with users, PPD.
Aimed at: no table of a paper. The numbers are those of ms-swift's example for this model on 20 thousand pairs of
RLAIF-V (arXiv 2405.17220). This has not been run on real weights here: log-probabilities are held against
transformers' own on a tiny model, the effect is not.
Expected curve: loss from ln 2 = 0.693 downwards, implicit accuracy upwards from one half.
"""

from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import AnswerTokens
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="Qwen/Qwen2-VL-7B-Instruct",
        dataset_name="HuggingFaceH4/rlaif-v_formatted",
        output_dir="qwen2-vl-dpo",
        # DPO's usual beta for answers (arXiv 2305.18290); the example leaves it, and the schedule, to its tool
        objective=DiffusionDPO(beta=0.1, draw=AnswerTokens()),
        # Rank 8, alpha 32, every linear layer of the decoder and none of the vision tower, 1e-4, 16 pairs a step, one
        # epoch of 20 thousand pairs, warm-up of 5 %: modelscope/ms-swift @ 0b45cce5,
        # examples/train/multimodal/rlhf/dpo.sh
        rank=8,
        lora_alpha=32,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        learning_rate=1e-4,
        max_train_samples=20_000,
        max_train_steps=1250,
        train_batch_size=1,
        gradient_accumulation_steps=16,
        lr_warmup_steps=62,
        lr_scheduler="cosine",
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        checkpointing_steps=250,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        seed=0,
    )
