"""How fast pictures are scored: the official HPSv2 call path, our command's path, and the bare image tower.

    python benchmarks/score_speed.py                        # ViT-B-32 and ViT-H-14; writes score_speed.md, 20 minutes
    python benchmarks/score_speed.py --device cuda --model ViT-H-14 --pictures 512 --output cuda.md

One process, one model, random weights (which cost what trained ones do), float32, the same 1024 px JPEG files, four to
a prompt. The ways take turns, so that a busy machine is so for all; their scores are checked equal. The official path
(tgxs002/HPSv2 @ 866735e, img_score.py) is written down here from its structure: picture by picture, a prompt with each,
both towers at batch one. It also loads the checkpoint anew for every call; that is measured apart.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from mmalign.data.media import open_source
from mmalign.data.score import BATCH_ROWS, score_media
from mmalign.scoring import load_scorer

A_PROMPT = 4  # pictures
SIDE = 1024


def write_pictures(folder: Path, count: int) -> Path:
    """JPEGs with the detail of photographs, more or less, and their table."""
    lines = []
    for number in range(count):
        random = np.random.Generator(np.random.Philox(key=[0, number]))
        layers = [random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (8, 64, 256)]
        parts = [np.asarray(Image.fromarray(layer).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for layer in layers]
        picture = sum(part * share for part, share in zip(parts, (0.6, 0.25, 0.15), strict=True))
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)
        prompt = f"a photo of thing number {number // A_PROMPT}, by the river, at dusk"
        lines.append(json.dumps({"prompt": prompt, "file_name": f"{number}.jpg"}))
    (folder / "table.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "table.jsonl"


def write_scorer(folder: Path, name: str) -> Path:
    """An HPSv2 of this architecture in the official layout: a checkpoint with `state_dict`."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False)
    torch.save({"state_dict": model.state_dict()}, folder / "model.pt")
    card = {
        "name": "random",
        "family": "clip",
        "model": {"open_clip": name},
        "weights": {"file": "model.pt", "key": "state_dict"},
        "preprocess": {"size": 224, "resize": "long-side-pad", "interpolation": "bicubic-tensor", "antialias": True},
        "score": {"formula": "cosine"},
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return folder


@torch.no_grad()
def official(scorer, table: Path) -> list[float]:
    """One picture and its prompt at a time, as the official `score` goes through them."""
    from torchvision.transforms import functional as V

    preprocess, found = scorer.preprocess, []
    for line in table.read_text().splitlines():
        row = json.loads(line)
        pixels = V.to_tensor(Image.open(table.parent / row["file_name"]).convert("RGB"))
        scale = 224 / max(pixels.shape[1:])
        pixels = V.resize(pixels, [round(side * scale) for side in pixels.shape[1:]], V.InterpolationMode.BICUBIC)
        down, right = (224 - side for side in pixels.shape[1:])
        pixels = V.pad(pixels, [right // 2, down // 2, right - right // 2, down - down // 2])
        pixels = V.normalize(pixels, preprocess.mean, preprocess.std)[None].to(scorer.device)
        image, text, _ = scorer.model(pixels, scorer.tokenizer([row["prompt"]]).to(scorer.device))
        found.append((image @ text.T)[0, 0].item())
    return found


def ours(scorer, table: Path) -> list[float]:
    """What `mmalign score table.jsonl` does."""
    import pyarrow.parquet as pq

    scorer.texts.clear()
    with tempfile.TemporaryDirectory() as place:
        target = score_media(open_source(table), {"random": scorer}, Path(place) / "scores.parquet")
        return pq.read_table(target)["random"].to_pylist()


@torch.no_grad()
def bare(scorer, batches: list[torch.Tensor]) -> None:
    """The image tower alone, on pictures that are prepared already."""
    for batch in batches:
        scorer.model.encode_image(batch)
    if scorer.device.type == "cuda":
        torch.cuda.synchronize()


def clocked(work) -> tuple[float, float, list]:
    """Seconds, CPU seconds, and what the work gave."""
    seconds, cpu = time.perf_counter(), time.process_time()
    given = work()
    return time.perf_counter() - seconds, time.process_time() - cpu, given


def measure(name: str, arguments) -> list[str]:
    """Rows of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        table = write_pictures(folder, arguments.pictures)
        write_scorer(folder, name)
        reload, _, scorer = clocked(lambda: load_scorer(folder, arguments.device))
        scorer.card.weights["sha256"] = "known"  # a run hashes the checkpoint once, however many pictures it has
        files = [table.parent / json.loads(line)["file_name"] for line in table.read_text().splitlines()]
        prepared = torch.stack([scorer.prepare(file) for file in files]).to(scorer.device)
        ways = {
            "official, one by one": lambda: official(scorer, table),
            "mmalign score": lambda: ours(scorer, table),
            "bare image tower": lambda: bare(scorer, list(prepared.split(BATCH_ROWS))),
        }
        bare(scorer, [prepared[:2]])
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            given = {}
            for way, work in ways.items():
                *took, given[way] = clocked(work)
                times[way].append((took[0], took[1]))
                print(name, way, *(f"{one:.1f}" for one in took), flush=True)
            np.testing.assert_allclose(given["mmalign score"], given["official, one by one"], atol=2e-6)
    which = 0 if arguments.device == "cuda" else 1
    base = np.array(times["official, one by one"])[:, which]
    tower = np.array(times["bare image tower"])[:, which]
    rows = []
    for way, several in times.items():
        own = np.array(several)[:, which]
        seconds, cpu = np.median(several, axis=0) / arguments.pictures
        spread = " to ".join(f"{one:.2f}" for one in sorted({(base / own).min(), (base / own).max()}))
        rows.append(
            f"| {name} | {way} | {seconds:.3f} | {cpu:.3f} | {np.median(base / own):.2f}x ({spread}) |"
            f" {np.median(own / tower):.2f}x |"
        )
    seconds = np.median(np.array(times["official, one by one"])[:, 0]) / arguments.pictures
    rows.append(f"| {name} | official, with its reload for every call | {seconds + reload:.3f} | | | |")
    return rows


def main() -> None:
    """Parses the command line, measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["ViT-B-32", "ViT-H-14"], help="of open_clip")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    rows = [row for name in arguments.model for row in measure(name, arguments)]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} CPU cores"
    unit = "seconds" if arguments.device == "cuda" else "CPU seconds, as other work ran beside"
    page = [
        "# How fast pictures are scored",
        "",
        f"`python benchmarks/score_speed.py --pictures {arguments.pictures} --rounds {arguments.rounds}"
        f" --model {' '.join(arguments.model)}`: {device}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, float32, {arguments.pictures} JPEGs of {SIDE} px, {A_PROMPT} to a prompt, medians of"
        f" {arguments.rounds} rounds; ratios are of {unit}, with the rounds' smallest and largest in brackets.",
        "",
        "| model | way | seconds a picture | CPU seconds a picture | faster than official | of the bare tower |",
        "| --- " * 6 + "|",
        *rows,
    ]
    arguments.output.write_text("\n".join(page) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
