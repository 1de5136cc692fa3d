"""What a training step costs live, from cached latents and text, and with the reference's answers cached too.

    python benchmarks/cache_cost.py                                       # writes cache_cost.md, some minutes
    python benchmarks/cache_cost.py --device cuda --preset sdxl-1024 --output sdxl.md

Presets: `embedded`, the embedded model with its Diffusion-DPO recipe (16 pairs a step); `sdxl-small`, SDXL's layout at
0.3 of its width with 256 px pictures; `sdxl-1024`, SDXL's own size. The latter two have random weights and random
pictures, which cost what real ones do, rank 8 and one pair a step. Every measurement is `train` in a fresh process,
from data on the disk; caches are filled before, in another process. Modes take turns, so that a busy machine is so for
all.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

WARM_UP, TIMED = 2, 4  # steps
UNITS = ("seconds", "cpu_seconds")
MODES = {
    "live": {},
    "latents and text": {"cache_dir": True},
    "and the reference": {"cache_dir": True, "cache_reference": True},
}
PIXELS = {"embedded": 64, "sdxl-small": 256, "sdxl-1024": 1024}
EXPECTED = (
    "Counting operations gives 1.23x for latents and text and 1.78x with the reference for a LoRA on SDXL at 1024 px"
)


def run_of(preset: str, folder: Path, mode: str):
    """The training run of a mode; the draws are fixed in every mode, which costs nothing by itself."""
    from mmalign.objectives import DiffusionDPO
    from mmalign.recipe import load_recipe
    from mmalign.training.run import Run

    steps = WARM_UP + TIMED
    if preset == "embedded":
        run = replace(load_recipe("embedded_diffusion_dpo"), cache_latents=False, dataset_name=str(folder / "data"))
    else:
        run = Run(str(folder / "model"), str(folder / "data"), "", DiffusionDPO(beta=5000), steps, 1e-5, rank=8)
    settings = {**MODES[mode]}
    if settings:
        settings["cache_dir"] = str(folder / "cache")
    return replace(
        run,
        output_dir=str(folder / "run"),
        max_train_steps=steps,
        checkpointing_steps=steps,
        draws_per_sample=1,
        **settings,
    )


def build(preset: str, folder: Path) -> None:
    """Model, data and caches."""
    from mmalign.data.export import write_comparisons
    from mmalign.training.loop import caches
    from mmalign.training.prepare import make_accelerator

    if preset != "embedded":
        random_sdxl(folder / "model", 1.0 if preset == "sdxl-1024" else 0.3)
    run = run_of(preset, folder, "and the reference")
    write_comparisons(folder / "data", random_pairs(run.train_batch_size, PIXELS[preset]))
    caches(run, make_accelerator(run))


def random_pairs(count: int, side: int) -> list:
    """Pairs of noise."""
    from PIL import Image

    from mmalign.records import Comparison
    from mmalign.surrogate.draws import generator

    def picture(*counters):
        return Image.fromarray(generator("pictures", *counters).integers(0, 256, (side, side, 3), dtype=np.uint8))

    return [
        Comparison(f"pair {i}", f"a picture of the number {i}", (picture(i, 0), picture(i, 1)), (1, 0))
        for i in range(count)
    ]


def random_sdxl(folder: Path, width: float, **changes: dict) -> None:
    """SDXL's layout with random weights; `width` multiplies the channels, and 1.0 is bfloat16 and SDXL itself.

    `changes` are to the configurations of its parts, by the part's name.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from mmalign.modalities.single_file import SDXL, tokenizer

    unet, vae, first, second = (dict(SDXL[name]) for name in ("unet", "vae", "text_encoder", "text_encoder_2"))
    if width < 1:
        unet |= {"block_out_channels": [96, 192, 384], "attention_head_dim": [2, 3, 6], "sample_size": 32}
        unet |= {"cross_attention_dim": 240 + 384, "projection_class_embeddings_input_dim": 6 * 256 + 384}
        vae |= {"block_out_channels": [32, 64, 128, 128], "sample_size": 256}
        first |= {"hidden_size": 240, "intermediate_size": 960, "num_attention_heads": 4, "projection_dim": 240}
        second |= {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "projection_dim": 384}
    for name, part in {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}.items():
        part |= changes.get(name, {})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if width < 1 else torch.bfloat16)
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel.from_config(unet),
        vae=AutoencoderKL.from_config(vae),
        scheduler=EulerDiscreteScheduler.from_config(SDXL["scheduler"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**first)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
    )
    torch.set_default_dtype(torch.float32)
    millions = sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6
    print(f"UNet: {millions:.0f} M parameters", file=sys.stderr, flush=True)
    pipeline.save_pretrained(folder)


def measure(run, train, warm_up: int = WARM_UP) -> dict:
    """Seconds and CPU seconds of every timed step, its loss, and the most memory until the last of them was taken."""
    from mmalign.training.memory import peak_bytes

    shutil.rmtree(run.output_dir, ignore_errors=True)  # the mode's before
    ends, losses, peak = [], [], 0

    def watch(step, metrics):
        nonlocal peak
        ends.append((time.perf_counter(), time.process_time()))
        losses.append(metrics["loss"])
        peak = peak_bytes()

    train(run, watch=watch, say=lambda line: None)
    seconds, cpu_seconds = np.diff(ends, axis=0)[warm_up - 1 :].T.tolist()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "gib": peak / 2**30, "losses": losses}


def apart(arguments, preset: str, folder: Path, task: str, **environment: str) -> dict:
    """A task of the script that was started, this one or one that imports it, in a process of its own."""
    command = [sys.executable, sys.argv[0], "--preset", preset, "--folder", str(folder), "--task", task]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}
    done = subprocess.run(command, env=os.environ | hidden | environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(preset: str, found: dict[str, list[dict]], unit: str) -> tuple[list[str], str]:
    """Rows of a preset, and its ratios in words; `unit`, seconds or CPU seconds, is what the ratios are of."""
    rounds = {mode: [np.median(one[unit]) for one in several] for mode, several in found.items()}
    rows, ratios = [], []
    for mode, several in found.items():
        each = np.divide(rounds["live"], rounds[mode])
        ratios.append(np.median(each))
        seconds, cpu_seconds = (np.median([s for one in several for s in one[name]]) for name in UNITS)
        gib = np.median([one["gib"] for one in several])
        rows.append(
            f"| {preset} | {mode} | {seconds:.2f} | {cpu_seconds:.2f} | {ratios[-1]:.2f}x"
            f" ({each.min():.2f} to {each.max():.2f}) | {gib:.2f} |"
        )
    return rows, f"{preset} {ratios[1]:.2f}x and {ratios[2]:.2f}x"


def machine(device: str) -> str:
    """The page's lines on where it was measured, and by which command."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")
    card = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = f"python {' '.join(['benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}"
    return (
        f"{os.cpu_count()} cores, {cpu}{card}; torch {torch.__version__}, {threads or torch.get_num_threads()} threads."
        f"\n\n```\n{f'OMP_NUM_THREADS={threads} ' if threads else ''}{command}\n```\n"
    )


def report(arguments, found: dict[str, dict[str, list[dict]]]) -> str:
    """The page."""
    rounds = len(next(iter(found.values()))["live"])
    parts = [table(preset, modes, UNITS[arguments.device == "cpu"]) for preset, modes in found.items()]
    shared = "" if arguments.device == "cuda" else "Ratios are of CPU seconds, as other work ran beside. "
    unrun = (
        "" if "sdxl-1024" in found else "\n`--device cuda --preset sdxl-1024` (the real size, bfloat16) was not run.\n"
    )
    return "\n".join(
        [
            "# What the cache saves in a step\n",
            machine(arguments.device),
            f"Diffusion-DPO with a LoRA; every line is {rounds} fresh processes of {TIMED} timed steps after"
            f" {WARM_UP} to warm up, the modes in turns. Medians; in brackets the smallest and the largest of the"
            f" rounds' ratios. {shared}Peak memory is of the whole process on a CPU, allocated on a GPU. The SDXL"
            " layouts have random weights and pictures, which tell a cost and nothing else.\n",
            "| model | cached | seconds a step | CPU seconds a step | faster than live | peak GiB |",
            "| --- " * 6 + "|",
            *(row for rows, _ in parts for row in rows),
            f"\n{EXPECTED}; measured here: {'; '.join(words for _, words in parts)}. A small model divides its work"
            f" otherwise between VAE, text encoders and UNet.\n{unrun}",
        ]
    )


def main() -> None:
    """Parses the command line; without `--task` it measures everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PIXELS), nargs="+", default=["embedded", "sdxl-small"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=["build", *MODES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        (preset,) = arguments.preset
        done = {}
        if arguments.task == "build":
            build(preset, arguments.folder)
        else:
            from mmalign.training.loop import train

            done = measure(run_of(preset, arguments.folder, arguments.task), train)
        print(json.dumps(done))
        return
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device here; leave out --device cuda.")
    found = {preset: {mode: [] for mode in MODES} for preset in arguments.preset}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for preset in found:
            (folder / preset).mkdir()
            apart(arguments, preset, folder / preset, "build")
        for _ in range(arguments.rounds):
            for preset, modes in found.items():
                for mode, several in modes.items():
                    several.append(apart(arguments, preset, folder / preset, mode))
                    print(preset, mode, several[-1], flush=True)
            arguments.output.write_text(report(arguments, found))  # after every round, should the next not end
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
