"""The embedded pipeline as a folder, its figures and its card; called by make_embedded.py, stage `export`."""

import copy
import json
import platform
import time
from pathlib import Path

import make_embedded_art
import numpy as np
import torch
from PIL import Image

import mmalign
from mmalign import embedded
from mmalign.embedded import scenes

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SAMPLER = {"timestep_spacing": "trailing"}  # the first step is t = 999, where nothing but noise is left


def build(model, vae):
    """The StableDiffusionXLPipeline of a trained model; guidance is against the empty prompt."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    tokens = make_embedded_art.cut_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=model.unet,
        scheduler=DDIMScheduler(**SCHEDULE, **SAMPLER, clip_sample=False, set_alpha_to_one=True),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def save(model, vae, folder: Path) -> None:
    """Writes the pipeline with float16 weights that load as float32 unless asked otherwise."""
    build(copy.deepcopy(model).half(), copy.deepcopy(vae).half()).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):  # transformers would follow the stored dtype
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    file = folder / "vae" / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
    file.write_text(json.dumps(kept, indent=2) + "\n")  # without the folder it came from
    for name in ("tokenizer", "tokenizer_2"):  # without indentation: less than half the size
        file = folder / name / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))


def sample(pipe, prompts: list[str], seed: int = 0, **sampling) -> np.ndarray:
    """Pictures, uint8 [N, 64, 64, 3]; picture i starts from noise of seed + i."""
    pictures = []
    for start in range(0, len(prompts), 32):
        texts = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(texts))]
        out = pipe(texts, generator=generators, output_type="np", **sampling)
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def grounds_right(prompts: list[str], pictures: np.ndarray) -> float:
    """Share of pictures whose ground, read from the border by hue, has the prompt's colour (chance 1/8)."""
    asked = [prompt.split()[-2] for prompt in prompts]
    return float(np.mean([scenes.ground(picture) == colour for picture, colour in zip(pictures, asked, strict=True)]))


@torch.inference_mode()
def retrieval(prompts: list[str], pictures: np.ndarray) -> float:
    """Share of pictures that the bundled contrastive CLIP puts nearest to their own prompt, of all the prompts."""
    scorer = mmalign.load_scorer("embedded-clip")
    pixels = torch.stack([scorer.preprocess(Image.fromarray(picture)) for picture in pictures])
    nearest = (scorer.model.encode_image(pixels) @ scorer.embed(prompts).T).argmax(1)
    return (nearest == torch.arange(len(prompts))).float().mean().item()


def measure(folder: Path, grid: Path) -> dict:
    """How far pictures of all development prompts follow their text, and their cost; draws the first 48."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    texts, start = embedded.prompts("development"), time.process_time()
    pictures = sample(pipe, texts, **embedded.SAMPLING)
    seconds = time.process_time() - start
    rows = [np.concatenate(list(pictures[i : i + 12]), axis=1) for i in range(0, 48, 12)]
    Image.fromarray(np.concatenate(rows)).save(grid)
    return {
        "split": "development",
        "prompts": len(texts),
        **embedded.SAMPLING,
        "ground_accuracy": round(grounds_right(texts, pictures), 4),
        "retrieval_top1": round(retrieval(texts, pictures), 4),
        "cpu_seconds_a_picture": round(seconds / len(texts), 3),
    }


def machine() -> dict:
    """Where the figures were measured."""
    import diffusers
    import transformers

    return {
        "machine": f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}, 2 threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def write_card(folder: Path, figures: dict) -> None:
    """The model card, with the figures in place."""
    template = (Path(__file__).parent / "make_embedded_card.md").read_text()
    flat = {f"{part}_{name}": value for part, facts in figures.items() for name, value in facts.items()}
    (folder / "README.md").write_text(template.format(**flat))


def export(model, vae, training: dict, folder: Path | None = None) -> None:
    """Final pipeline, its figures in benchmarks/embedded.json, and its card."""
    folder = folder or embedded.path()
    here = Path(__file__).parent
    save(model, vae, folder)
    figures = {**training, "sampling": measure(folder, here / "embedded.png"), "made": machine()}
    figures["made"]["megabytes"] = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6, 2)
    (here / "embedded.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(folder, figures)
