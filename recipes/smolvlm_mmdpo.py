"""MM-DPO on SmolVLM2 2.2B with a LoRA, for one card of 24 GB or more.

    mmalign train smolvlm_mmdpo --dataset-name DATA --output-dir smolvlm-mmdpo

DATA is a folder with comparisons.jsonl or parquet files of scored lists of answers about a picture; every two answers
whose scores differ are a pair. A reward model gives the scores: the paper's is MM-RLHF-Reward-7B, and k fits its units.
The released pairs of MM-RLHF have no scores, so they cannot be trained on as they are.
Aimed at: arXiv 2502.10391, which fully fine-tunes LLaVA-OneVision and InternVL (its figures: LLaVA-OneVision 7B plus
19.5 % in conversation); SmolVLM is not among its models. This has not been run on real weights here: the arithmetic is
held against the paper's formula, the effect is not.
Expected curve: loss downwards from ln 2 = 0.693 plus a quarter of the chosen answers' mean nats a token.
"""

from mmalign.objectives import MMDPO
from mmalign.surrogate import AnswerTokens
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        dataset_name="lists",
        output_dir="smolvlm-mmdpo",
        # beta and gamma: Kwai-YuanQi/MM-RLHF @ 7c8af1d2 scripts/train/dpo_ov7b.sh, whose w is 0.1 but without effect.
        # w and k: the paper's as others quote it, not checked; gamma was searched for in {0, 0.1, 0.25, 0.5, 1}
        objective=MMDPO(beta=0.1, w=0.5, k=0.5, gamma=0.25, draw=AnswerTokens()),
        # Cosine, warm-up of 10 %, no weight decay: the same script. It has 1e-6 for all weights of a 7B decoder; for a
        # LoRA we take the largest that the paper searched among
        learning_rate=1e-5,
        lr_scheduler="cosine",
        lr_warmup_steps=83,
        adam_weight_decay=0.0,
        rank=16,
        # Ours: 24 lists of 3 to 5 answers are about a hundred pairs; once over 20 thousand lists. There 12 pairs a card
        max_train_steps=830,
        train_batch_size=1,
        gradient_accumulation_steps=24,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        # A list fits where a pair does
        backward="two-pass",
        rows_at_once=2,
        checkpointing_steps=100,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        seed=0,
    )
