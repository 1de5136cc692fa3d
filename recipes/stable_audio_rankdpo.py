"""RankDPO on Stable Audio Open with a LoRA, for one card of 24 GB or more.

    mmalign train stable_audio_rankdpo --dataset-name DATA --output-dir stable-audio-rankdpo

DATA is a folder with comparisons.jsonl or parquet files of ranked lists of sounds, each one's score in [0, 1] the share
of comparisons that it won (mmalign.data.label.ranked), by CLAP's judgement for instance. Sounds are stereo at 44.1 kHz
or become so; longer ones are cut at 47 seconds. Generation with the published scheduler needs `pip install torchsde`.

Nobody has published RankDPO for sounds, so these constants are ours: beta as Tango 2's (recipe tango2_audio), learning
rate and rank as usual for LoRAs of a transformer of a billion weights. Not run on real weights here.
Expected curve: loss downwards from ln 2 times the mean sum of a list's weights.
"""

from mmalign.objectives import RankDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="stabilityai/stable-audio-open-1.0",
        dataset_name="ranked-sounds",
        output_dir="stable-audio-rankdpo",
        objective=RankDPO(beta=2000),
        rank=16,
        learning_rate=1e-5,
        max_train_steps=1000,
        # 32 lists a step; two sounds are held at once, however long the list
        train_batch_size=1,
        gradient_accumulation_steps=32,
        backward="two-pass",
        rows_at_once=2,
        # As the network was trained: cfg_dropout_prob of stable-audio-tools @ 50049e3, training/factory.py:108
        proportion_empty_prompts=0.1,
        checkpointing_steps=100,
        checkpoints_total_limit=3,
        dataloader_num_workers=4,
        validation_prompts=("a dog barks, then rain falls on a roof", "a calm piano piece with soft strings"),
        validation_steps=100,
        seed=0,
    )
