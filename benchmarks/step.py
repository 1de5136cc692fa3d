"""Our training step beside the published scripts': time, memory, and the operations that both take.

    python benchmarks/step.py                                             # reduced SDXL on a CPU; writes step.md, .png
    python benchmarks/step.py --device cuda --preset sdxl-1024 --rounds 1 --output sdxl_1024.md

Presets: `sdxl-small`, SDXL's layout in such widths that VAE and reference have the share of the step's operations that
they have in SDXL at 1024 px; `sdxl-1024`, SDXL itself; `sd3-medium` at 1024 px, without its T5; `dit-video`, the same
transformer on as many tokens as a clip of CogVideoX has (2112 px: 17,424; 49 frames of 480 x 720: 17,550), as the
cases are written for pictures; `tiny`, for the test. Weights and pictures are random, which cost what real ones do.

Every measurement is a fresh process from data on the disk, on the same weights, pictures and draws; cases take turns.
"""

import argparse
import contextlib
import json
import math
import subprocess
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from cache_cost import UNITS, apart, machine, measure, random_pairs, random_sdxl

WARM_UP, TIMED = 1, 2  # steps
PIXELS = {"sdxl-small": 256, "sdxl-1024": 1024, "sd3-medium": 1024, "dit-video": 2112, "tiny": 64}


def reduced(unet: list, layers: list, vae: list, text: tuple[int, int], **depth: int) -> dict[str, dict]:
    """Changes to SDXL's configurations; all numbers are widths and depths."""
    readers = [
        {"hidden_size": d, "intermediate_size": 4 * d, "num_attention_heads": 2, "projection_dim": d} for d in text
    ]
    blocks = {"block_out_channels": unet, "attention_head_dim": [channels // 32 for channels in unet]}
    widths = {"cross_attention_dim": sum(text), "projection_class_embeddings_input_dim": 6 * 256 + text[1]}
    return {
        "unet": blocks | widths | {"transformer_layers_per_block": layers},
        "vae": {"block_out_channels": vae},
        "text_encoder": readers[0] | depth,
        "text_encoder_2": readers[1] | depth,
    }


REDUCED = {
    "sdxl-small": reduced([96, 192, 384], [1, 2, 5], [32, 64, 128, 128], (64, 128)),
    "tiny": reduced([32, 64, 64], [1, 1, 1], [32, 32, 32, 32], (32, 32), num_hidden_layers=1),
}

CHANGE_NO_COUNT = {"attention", "compile", "channels_last", "train_batch_size", "mixed_precision"}
CHANGE_NO_COUNT |= {"fused_backward", "max_grad_norm", "environment", "published", "gradient_accumulation_steps"}
IMPORTED = [f"diffusers.pipelines.{name}.pipeline_{name}" for name in ("stable_diffusion_xl", "stable_diffusion_3")]
IMPORTED += ["peft", "accelerate", "torch._dynamo"]  # the last comes with an optimizer's first call
ON_A_GPU = ("efficient", "flash", "cudnn", "xformers")
LIVE = {"published": False}
CACHED = LIVE | {"cache_dir": "cache"}
ALL = CACHED | {"cache_reference": True}
WHOLE = {"use_lora": False, "optimizer": "adafactor"}
SMALL = {"gradient_checkpointing": True, "fused_backward": True, "max_grad_norm": 0.0}
# Else glibc keeps what was freed in pieces that fit nothing; on a GPU it changes nothing
SMALL["environment"] = {f"MALLOC_{name}_THRESHOLD_": "1000000" for name in ("MMAP", "TRIM")}
SALESFORCE = WHOLE | {"published": True, "gradient_checkpointing": True}
# The script sums 128 batches. An optimizer's arithmetic is in no count, and once a batch it is a quarter of our step
SUMMED = {"gradient_accumulation_steps": 8}
# The first of each kind is the published script's step, which the others of its kind are compared with
CASES: dict[str, dict[str, dict]] = {
    "LoRA": {
        "diffusers' script": {"published": True},
        "ours, live": LIVE,
        "ours, latents and text cached": CACHED,
        "ours, reference cached too": ALL,
    },
    "whole network": {
        "Salesforce's script": SALESFORCE,
        "ours, latents and text cached": WHOLE | CACHED,
        "ours, reference cached too": WHOLE | ALL,
        "ours, small": WHOLE | ALL | SMALL,
        "ours, a LoRA instead": ALL,
    },
    "whole network, 8 batches summed": {
        "Salesforce's script": SALESFORCE | SUMMED,
        "ours, reference cached too": WHOLE | ALL | SUMMED,
    },
    "sweep (LoRA, all cached)": {
        "as above": ALL,
        "two pairs at once": ALL | {"train_batch_size": 2},
        "four pairs at once": ALL | {"train_batch_size": 4},
        "lists of 4": ALL | {"members": 4},
        "lists of 8": ALL | {"members": 8},
        "lists of 8, two-pass": ALL | {"members": 8, "backward": "two-pass"},
        "all blocks checkpointed": ALL | {"gradient_checkpointing": True},
        "every second block checkpointed": ALL | {"gradient_checkpointing": True, "gradient_checkpointing_every": 2},
        "channels last": ALL | {"channels_last": True},
        "compiled": ALL | {"compile": True},
        "bfloat16": ALL | {"mixed_precision": "bf16"},
        **{f"attention {name}": ALL | {"attention": name} for name in ("math", "sdpa", *ON_A_GPU)},
    },
}
NAMES = {f"{kind}: {name}": settings for kind, cases in CASES.items() for name, settings in cases.items()}


def run_of(preset: str, folder: Path, case: str):
    """The run of a case; a published script takes the same recipe."""
    from mmalign.objectives import DiffusionDPO
    from mmalign.training.run import Run

    settings = {"members": 2, **NAMES[case]}
    members, steps = settings.pop("members"), WARM_UP + TIMED
    del settings["published"]
    settings.pop("environment", None)
    if "cache_dir" in settings:
        settings["cache_dir"] = str(folder / f"cache{members}")
    size = {"rank": 16 if preset in REDUCED else 64, "resolution": PIXELS[preset]}
    places = (str(folder / name) for name in ("model", f"data{members}", "run"))
    run = Run(*places, DiffusionDPO(beta=5000), steps, 1e-5, draws_per_sample=1, checkpointing_steps=steps, **size)
    return replace(run, **settings)


def build(preset: str, folder: Path, task: str = "") -> None:
    """Model, data and caches."""
    from mmalign.data.export import write_comparisons
    from mmalign.training.loop import caches
    from mmalign.training.prepare import make_accelerator

    if preset in ("sd3-medium", "dit-video"):
        random_sd3(folder / "model")
    else:
        random_sdxl(folder / "model", 0.3 if preset in REDUCED else 1.0, **REDUCED.get(preset, {}))
    for members in (2, 4, 8):
        pairs = iter(random_pairs(2 * members, PIXELS[preset]))
        lists = []
        for number, first in enumerate(random_pairs(4, 8)):
            media = tuple(picture for _ in range(members // 2) for picture in next(pairs).media)
            lists.append(replace(first, id=f"list {number}", media=media, score=tuple(range(members))))
        write_comparisons(folder / f"data{members}", lists)
        settings = {"cache_dir": str(folder / f"cache{members}"), "dataset_name": str(folder / f"data{members}")}
        run = replace(run_of(preset, folder, "LoRA: ours, reference cached too"), **settings)
        caches(run, make_accelerator(run))


def build_bfloat16(preset: str, folder: Path, task: str = "") -> None:
    """The cache of the case in bfloat16, which is one of its own; a process has one precision."""
    from mmalign.training.loop import caches
    from mmalign.training.prepare import make_accelerator

    run = run_of(preset, folder, "sweep (LoRA, all cached): bfloat16")
    caches(run, make_accelerator(run))


def random_sd3(folder: Path) -> None:
    """SD3-medium's layout with random bfloat16 weights, without its T5, which its pipeline allows."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from mmalign.modalities.single_file import BIG_G, CLIP_L, VAE, tokenizer

    torch.set_default_dtype(torch.bfloat16)
    size = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    readers = [CLIPTextModelWithProjection(CLIPTextConfig(**config)) for config in (CLIP_L, BIG_G)]
    vae = {**VAE, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    pipeline = StableDiffusion3Pipeline(
        SD3Transformer2DModel(sample_size=128, out_channels=16, pooled_projection_dim=768 + 1280, **size),
        Scheduler(shift=3.0),
        AutoencoderKL.from_config(vae | {"use_quant_conv": False, "use_post_quant_conv": False}),
        *(readers[0], tokenizer(), readers[1], tokenizer(), None, None),
    )
    torch.set_default_dtype(torch.float32)
    pipeline.save_pretrained(folder)


def published(run, watch, say) -> None:
    """Trains with steps of the published scripts' structure, on our draws.

    Both encode pictures (the VAE in float32) and text in every step, ask the policy and then, while its activations are
    held, the reference, and read their numbers off the device one by one. With a LoRA as huggingface/diffusers
    examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py @ 58eb52c0: the reference is the network with
    its adapters off, four numbers are read after the update. Without as SalesforceAIResearch/DiffusionDPO train.py @
    5233e759: the reference is a second network, gradients are checkpointed, numbers are read before backward too, and
    as many batches are summed before an update as the recipe says.
    """
    import torch
    from torch.nn.functional import logsigmoid

    import mmalign
    from mmalign.data.loader import Batches
    from mmalign.training.cached import read_data
    from mmalign.training.checkpoint import trained
    from mmalign.training.prepare import make_accelerator, make_optimizer, prepare_policy
    from mmalign.training.step import Step

    accelerator = make_accelerator(run)
    modality = mmalign.load(run.pretrained_model_name_or_path, device=accelerator.device)
    views = prepare_policy(modality, run)
    parameters = list(trained(modality.network).values())
    optimizer, schedule = make_optimizer(run, parameters)
    modality.network, optimizer = accelerator.prepare(modality.network, optimizer)
    step = Step(run, modality, views, accelerator)
    batches = Batches(read_data(run, strict=True).comparisons, groups_per_batch=run.train_batch_size, seed=run.seed)
    summed, read = run.gradient_accumulation_steps, []
    for number, (items, _) in enumerate(batches.iterate(0, run.max_train_steps * summed), 1):
        probe, feedback = step.probe(items, [0] * len(items))
        win, lose = feedback.pairs()
        errors = -2 * probe.logp(modality.predict(probe, "policy"))
        with torch.no_grad(), views("reference"):
            known = -2 * probe.logp(modality.predict(probe, "reference"))
        inside = -0.5 * run.objective.beta * ((errors[win] - errors[lose]) - (known[win] - known[lose]))
        loss = -logsigmoid(inside).mean()
        numbers = [loss, errors.mean(), known.mean(), (inside > 0).float().mean()]
        if not run.use_lora:
            [value.item() for value in numbers]
        accelerator.backward(loss / summed)
        if number % summed == 0:
            accelerator.clip_grad_norm_(parameters, run.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        read += [[value.item() for value in numbers]]
        if number % summed == 0:
            watch(number // summed, {"loss": np.mean(read, axis=0)[0]})
            read = []


def measured(preset: str, folder: Path, case: str) -> dict:
    """What `cache_cost.measure` finds, the memory before it, and a matrix product's operations a (CPU) second."""
    import torch

    from mmalign.training.loop import train
    from mmalign.training.memory import GIB, peak_bytes

    for name in IMPORTED:
        import_module(name)
    empty = peak_bytes() / GIB
    found = measure(run_of(preset, folder, case), published if NAMES[case]["published"] else train, WARM_UP)
    cuda = torch.cuda.is_available()
    size, kind = (8192, torch.bfloat16) if cuda else (1536, torch.float32)
    matrix, best = torch.randn(size, size, dtype=kind, device="cuda" if cuda else "cpu"), []
    for _ in range(5):
        started = time.perf_counter(), time.process_time()
        matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        best.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return found | {"empty": empty, "ceiling": [2 * size**3 / max(min(each), 1e-9) for each in zip(*best, strict=True)]}


def counts(preset: str, folder: Path, task: str = "") -> dict:
    """Case -> operations of a comparison by part."""
    from mmalign.training.flops import operations

    made: dict[str, dict[str, int]] = {}
    for case, own in NAMES.items():
        key = str({name: value for name, value in own.items() if name not in CHANGE_NO_COUNT})
        if key not in made:
            made[key] = operations(run_of(preset, folder, case), members=own.get("members", 2))
        made[case] = made[key]
    return {case: made[case] for case in NAMES}


def scale(preset: str, folder: Path, task: str = "") -> dict:
    """Operations of SDXL's step (LoRA of rank 64, all cached) by a list's length, and by resolution."""
    import torch
    from diffusers import UNet2DConditionModel

    from mmalign.modalities import Skeleton
    from mmalign.modalities.image_unet import UNetModality, example
    from mmalign.modalities.single_file import SDXL
    from mmalign.training.flops import operations

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL["unet"])
    skeleton = Skeleton({"network": unet}, partial(example, unet.config, 8), UNetModality.targets)
    run = run_of("sdxl-1024", folder, "LoRA: ours, reference cached too")
    sizes = {"members": [(k, 1024, k) for k in (2, 4, 8, 16)], "side": [(2, r, r) for r in (512, 768, 1024, 1536)]}
    return {
        name: {key: sum(operations(replace(run, resolution=side), skeleton, k).values()) for k, side, key in asked}
        for name, asked in sizes.items()
    }


def compared(found: dict[str, list[dict]], counted: dict[str, dict[str, int]], unit: str) -> dict[str, dict]:
    """Case -> its figures; `unit`, seconds or CPU seconds, is what ratios and utilisation are of."""
    ceiling = max(one["ceiling"][UNITS.index(unit)] for several in found.values() for one in several)
    factors = ("train_batch_size", "gradient_accumulation_steps")
    size = {
        name: NAMES[name].get("members", 2) * math.prod(NAMES[name].get(factor, 1) for factor in factors)
        for name in found
    }
    each = {name: sum(parts.values()) / NAMES[name].get("members", 2) for name, parts in counted.items()}  # of a sample
    rows = {}
    for case, several in found.items():
        kind = case.split(": ")[0]
        base = f"{kind}: {next(iter(CASES[kind]))}"
        floor = f"{'LoRA' if NAMES[case].get('use_lora', True) else 'whole network'}: ours, reference cached too"
        mine, other = ([np.median(one[unit]) / size[name] for one in found[name]] for name in (case, base))
        per = {name: np.median([s for one in several for s in one[name]]) for name in UNITS}
        rows[case] = per | {
            "samples": size[case] / per["seconds"],
            "ratios": np.array([a / b for a, b in zip(other, mine, strict=False)]),
            "counted": each[base] / each[case],
            "gib": np.median([one["gib"] for one in several]),
            "above": np.median([one["gib"] - one["empty"] for one in several]),
            "utilisation": each[floor] * size[case] / per[unit] / ceiling,
        }
    return rows


def same_losses(found: dict[str, list[dict]], tolerance: float = 1e-5) -> str:
    """A line on how far the losses of a kind's cases are apart.

    Raises:
        SystemExit: the first ones are further apart than `tolerance`.
    """
    words = []
    for kind in CASES:
        kept = kind == "LoRA"
        alike = [name for name in found if name.split(": ")[0] == kind and NAMES[name].get("use_lora", True) == kept]
        if alike:
            losses = np.array([one["losses"] for name in alike for one in found[name]])
            first, second, last = np.ptp(losses, axis=0)[[0, 1, -1]]
            if not first <= tolerance:
                raise SystemExit(f"{kind}: the first losses differ by {first:.2g}: the cases do not do the same.")
            words.append(f"{kind} {first:.1g} at the first step, {second:.1g} at the second, {last:.1g} at the last")
    return f"Losses of the cases differ by at most: {'; '.join(words)}."


def kept_losses(found: dict[str, list[dict]]) -> str:
    """A line on how far each switch of the sweep takes the losses from those of the same steps without it."""
    swept = {
        name.split(": ")[1]: several[0]["losses"]
        for name, several in found.items()
        if "sweep" in name and not NAMES[name].keys() & {"members", "train_batch_size"}  # other data
    }
    base = np.array(swept.pop("as above"))
    words = [f"{name} {np.abs(base - losses).max():.1g}" for name, losses in swept.items()]
    return (
        f"Losses of {len(base)} steps of the sweep differ from those of its first line by at most: {', '.join(words)}."
    )


def aims(rows: dict[str, dict]) -> str:
    """A line on what was hoped for and what was found."""
    best = {kind: rows[f"{kind}: ours, reference cached too"] for kind in CASES if "sweep" not in kind}
    reached = [f"{kind} {np.median(row['ratios']) / row['counted']:.0%}" for kind, row in best.items()]
    small, theirs = (rows[f"whole network: {name}"] for name in ("ours, small", "Salesforce's script"))
    parts = [f"{small[name] / theirs[name]:.2f} {words}" for name, words in (("above", "above"), ("gib", "with"))]
    return (
        f"Aims: with the reference cached, at least 90 % of the ratio by count: {', '.join(reached)}. Our small step's"
        f" peak memory at most 0.50 of the Salesforce script's: {', '.join(parts)} the empty process."
    )


HEADS = ("kind", "step", "seconds", "CPU seconds", "samples a second", "faster", "by count", "reached")
HEADS += ("utilisation", "peak GiB", "above empty")


def report(arguments, found: dict[str, list[dict]], counted: dict, scaled: dict) -> str:
    """The page, and its plot beside it."""
    cpu = arguments.device == "cpu"
    rows = compared(found, counted, UNITS[cpu])
    live = counted["LoRA: ours, live"]
    shares = ", ".join(f"{name} {count / sum(live.values()):.1%}" for name, count in live.items())
    lines = [
        "# Our step beside the published scripts'\n",
        machine(arguments.device),
        f"Preset {arguments.preset}; operations of a live LoRA step: {shares}. Every case is a fresh process a round,"
        f" with {TIMED} timed steps after {WARM_UP} to warm up; {max(map(len, found.values()))} rounds in turns, the"
        f" sweep one. Medians; `faster` is in samples a second{' of CPU time, as other work ran' if cpu else ''}, with"
        " the rounds' smallest and largest; `by count` is what operations a sample say, `reached` the share of that."
        " Utilisation is of the policy's forward and backward alone, without recomputation, against the best matrix"
        " product of the same run. Peak memory is of the whole process on a CPU, allocated on a GPU; `above"
        " empty` is without that of a process that has imported everything and loaded nothing. `small` is with"
        " gradient checkpointing, a fused backward, and glibc told by MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_"
        " (1 MB) to give freed memory back."
        f"{' The presets for a GPU were not run for this page.' if cpu else ''}\n",
        same_losses(found) + "\n",
        aims(rows) + "\n",
        f"| {' | '.join(HEADS)} |",
        "| --- " * len(HEADS) + "|",
    ]
    for case, row in rows.items():
        ratio = np.median(row["ratios"])
        figures = " | ".join(f"{row[name]:.2f}" for name in (*UNITS, "samples"))
        lines.append(
            f"| {' | '.join(case.split(': '))} | {figures} |"
            f" {ratio:.2f}x ({row['ratios'].min():.2f} to {row['ratios'].max():.2f}) | {row['counted']:.2f}x"
            f" | {ratio / row['counted']:.0%} | {row['utilisation']:.0%} | {row['gib']:.2f} | {row['above']:.2f} |"
        )
    if any("sweep" in name for name in found):
        lines.append(f"\n{kept_losses(found)}")
    lines.append(f"\n![Measured ratios beside counted ones]({plot(arguments.output, rows).name})\n")
    if scaled:
        lines += ["## Scale, from counts\n", "SDXL, LoRA of rank 64, everything cached; TFLOP of a step of one list.\n"]
        for name, power in (("members", 1), ("side", 2)):  # tokens grow with the side's square
            first, least = next(iter(scaled[name].items()))
            lines += [f"| {name} | TFLOP | of the first | its share of members or tokens |", "| --- " * 4 + "|"]
            for key, count in scaled[name].items():
                share = (int(key) / int(first)) ** power
                lines.append(f"| {key} | {count / 1e12:.1f} | {count / least:.2f} | {share:.2f} |")
            lines.append("")
    return "\n".join(lines)


def plot(output: Path, rows: dict[str, dict]) -> Path:
    """Measured and counted ratios, and peak memory, a line a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 0.4 * len(rows) + 1), sharey=True)
    places = np.arange(len(rows))[::-1]
    low, middle, high = np.transpose([np.quantile(row["ratios"], [0, 0.5, 1]) for row in rows.values()])
    speed.barh(places + 0.2, middle, 0.4, xerr=[middle - low, high - middle], label="measured")
    speed.barh(places - 0.2, [row["counted"] for row in rows.values()], 0.4, label="by operations")
    speed.set_yticks(places, list(rows))
    speed.set_xlabel("samples a second, of the first of its kind")
    speed.legend()
    memory.barh(places, [row["above"] for row in rows.values()], 0.5, color="tab:gray")
    memory.set_xlabel("peak memory above an empty process, GiB")
    figure.savefig(output.with_suffix(".png"), dpi=120, bbox_inches="tight")
    return output.with_suffix(".png")


TASKS = {"build": build, "build bfloat16": build_bfloat16, "count": counts, "scale": scale}


def main() -> None:
    """Parses the command line; without `--task` it measures everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PIXELS), default="sdxl-small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=[*TASKS, *NAMES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(TASKS.get(arguments.task, measured)(arguments.preset, arguments.folder, arguments.task)))
        return
    cpu = arguments.device == "cpu"
    cases = [case for case, own in NAMES.items() if not (cpu and own.get("attention") in ON_A_GPU)]
    found: dict[str, list[dict]] = {case: [] for case in cases if "sweep" not in case}
    with tempfile.TemporaryDirectory() as name:
        ask = partial(apart, arguments, arguments.preset, Path(name))
        ask("build")
        ask("build bfloat16")
        counted = ask("count")
        for _ in range(arguments.rounds):
            for case, several in found.items():
                twin = next(name for name in found if NAMES[name] == NAMES[case])  # measured in this round, or itself
                several.append(ask(case, **NAMES[case].get("environment", {})) if twin == case else found[twin][-1])
                print(case, several[-1], flush=True)
            arguments.output.write_text(report(arguments, found, counted, {}))  # should the next round not end
        for case in cases:
            twin = next((name for name in found if NAMES[name] == NAMES[case]), None)
            if twin:
                found.setdefault(case, found[twin][-1:])
                continue
            with contextlib.suppress(subprocess.CalledProcessError):  # too large for this machine: left out
                found[case] = [ask(case)]
                print(case, found[case][-1], flush=True)
        arguments.output.write_text(report(arguments, found, counted, ask("scale")))
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
