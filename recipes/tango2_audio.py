"""Tango 2's training, on AudioLDM 2: one epoch of SFT on the chosen sounds, then Diffusion-DPO; for one card of 24 GB.

    mmalign train tango2_audio --dataset-name DATA --objective SFT --max-train-steps 939 --output-dir tango2-sft
    mmalign train tango2_audio --dataset-name DATA --pretrained-model-name-or-path tango2-sft --output-dir tango2

DATA is declare-lab/audio-alpaca, or files in its columns: prompt, and the chosen and rejected sound, in mono.
Aimed at: arXiv 2404.09956 (README of declare-lab/tango: Tango-full-FT to Tango 2, CLAP 0.54 to 0.57, KL 1.15 to 1.12,
FAD 2.51 to 2.69, which is worse). It trains Tango, whose checkpoints have no pipeline of diffusers; AudioLDM 2 has the
same front end and path. Neither was run on real weights here: the arithmetic is held against the official numbers, the
effect is not.
Expected curve: the first run's loss falls; the second one's starts at ln 2 = 0.693.

Deviation: in the official script the reference is the network before the SFT epoch, here the one after it. With LoRAs
(--use-lora in both) it is the official one where the second run is started in Python: adapters off are the base.

    train(recipe, modality=mmalign.load("cvssp/audioldm2", lora="tango2-sft"))
"""

from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run


def recipe() -> Run:
    """The run."""
    return Run(
        pretrained_model_name_or_path="cvssp/audioldm2",
        dataset_name="declare-lab/audio-alpaca",
        output_dir="tango2-audio",
        # beta, learning rate, warm-up, 4 pairs at once, 4 times a step: README of declare-lab/tango @ 34ecd38, lines
        # 155-165. The whole UNet, as there
        objective=DiffusionDPO(beta=2000),
        use_lora=False,
        learning_rate=9.6e-7,
        lr_warmup_steps=200,
        train_batch_size=4,
        gradient_accumulation_steps=4,
        # 5 epochs of which the first is SFT; "about 15k" pairs are 939 steps an epoch in one process
        max_train_steps=4 * 939,
        # Linear decay, AdamW (0.9, 0.999) with weight decay 1e-2, no clipping: tango2/tango2-train.py there. Its decay
        # goes on from the SFT epoch; here each run has its own
        lr_scheduler="linear",
        max_grad_norm=0.0,
        checkpointing_steps=939,
        checkpoints_total_limit=2,
        dataloader_num_workers=4,
        validation_prompts=("a dog barks, then rain falls on a roof", "a man speaks while a car engine starts"),
        validation_steps=939,
        seed=0,
    )
