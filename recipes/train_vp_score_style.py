"""VP-Score's way: four aspect heads on ImageReward's BLIP, from an AI's marks (VisionPrefer, arXiv 2404.15100).

    mmalign annotate candidates --model HUB_ID        # a vision-language model marks four aspects, 1 to 5
    mmalign pairs candidates --mode all --output-dir judged
    mmalign train-scorer train_vp_score_style --dataset-name judged --output-dir my-vp-score

Neither code nor weights of VP-Score are public. From the paper: the aspects, and ImageReward's pairwise loss. From
ImageReward (THUDM/ImageReward @ c1392c6, train/scripts/train_one_node.sh): lr 1e-5 with cosine decay, no warm-up, 64
comparisons a step, 0.7 of the blocks fixed. Ours: the steps.
Aimed at: nothing that can be checked. Not reproduced: the weights it starts from have not been run by us.
"""

from mmalign.scoring.fit import ScorerRun


def recipe() -> ScorerRun:
    """The run."""
    return ScorerRun(
        scorer="imagereward",
        dataset_name="judged",
        output_dir="vp-score-style",
        loss="bradley_terry",
        head="mlp",
        aspects=("prompt-following", "aesthetic", "fidelity", "harmlessness"),
        max_train_steps=2000,
        learning_rate=1e-5,
        lr_scheduler="cosine",
        train_batch_size=64,
        frozen_fraction=0.7,
        checkpointing_steps=500,
    )
