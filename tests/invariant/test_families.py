"""Every family and the methods that apply: two steps, saved, loaded in the plain library, the same media.

README's table of methods and families is `table()`: a cell stands there because it is a test here.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mmalign
from mmalign.data.users import Users, write_users
from mmalign.media import make_sound, make_video, sound_of
from mmalign.objectives import PPD, DiffusionDPO, InPO, MaPO, RankDPO, SmPO
from mmalign.records import Text
from mmalign.surrogate import AnswerTokens, DDIMInversion, ReNoise
from mmalign.training.loop import train
from mmalign.training.run import Run
from tests import tiny, tiny_audio, tiny_dit, tiny_video, tiny_vlm

METHODS = ("DiffusionDPO", "MaPO", "SmPO", "InPO", "RankDPO", "PPD")
ON_NOISE = {
    "DiffusionDPO": DiffusionDPO(beta=100),
    "MaPO": MaPO(),
    "SmPO": SmPO(beta=100, draw=ReNoise(steps=2)),
    "InPO": InPO(beta=100, draw=DDIMInversion(steps=2)),
    "RankDPO": RankDPO(beta=100),
    "PPD": PPD(beta=100),
}
ON_TOKENS = {
    "DiffusionDPO": DiffusionDPO(beta=0.1),
    "SmPO": SmPO(beta=0.1, draw=AnswerTokens()),
    "RankDPO": RankDPO(beta=0.1, draw=AnswerTokens()),
    "PPD": PPD(beta=0.1),
}


@dataclass(frozen=True)
class Kind:
    """Families of one modality: how their tiny ones are made, trained and asked."""

    name: str
    make: dict
    comparisons: object
    settings: dict
    whole: tuple[str, ...]  # families that are trained by every method; the others by the first two
    objectives: dict = field(default_factory=lambda: ON_NOISE)
    run: dict = field(default_factory=dict)  # family -> changes to its run


SMALLER = {"Sana": {"resolution": 64}} | {
    name: {"resolution": 32} for name in ("FLUX.1", "FLUX.2 klein", "Qwen-Image", "Z-Image")
}
CLIPS = dict.fromkeys(tiny_video.FAMILIES, tiny_video.RUN)
QUICK = {"num_inference_steps": 2}
UNETS = {
    "SD 1.5": lambda folder: tiny.tiny_pipeline(folder, xl=False),
    "SDXL": lambda folder: tiny.tiny_pipeline(folder, xl=True),
}
KINDS = (
    Kind("images, UNet", UNETS, tiny_dit.comparisons, dict.fromkeys(UNETS, QUICK), ("SDXL",)),
    Kind("images, transformer", tiny_dit.FAMILIES, tiny_dit.comparisons, tiny_dit.SETTINGS, ("SD3",), run=SMALLER),
    Kind("video", tiny_video.FAMILIES, tiny_video.comparisons, tiny_video.SETTINGS, ("Wan 2.1",), run=CLIPS),
    Kind("audio", tiny_audio.FAMILIES, tiny_audio.comparisons, tiny_audio.SETTINGS, ("AudioLDM2",)),
    Kind("vision-language", tiny_vlm.FAMILIES, tiny_vlm.comparisons, tiny_vlm.SETTINGS, ("Qwen2-VL",), ON_TOKENS),
)
KIND_OF = {family: kind for kind in KINDS for family in kind.make}
CELLS = [
    (family, method)
    for family, kind in KIND_OF.items()
    for method in kind.objectives
    if family in kind.whole or method in METHODS[:2]
]


def table():
    """What README shows: which of a modality's families were trained here by a method."""
    lines = ["| | " + " | ".join(METHODS) + " |", "| --- " * (1 + len(METHODS)) + "|"]
    for kind in KINDS:
        cells = [[family for family in kind.make if (family, method) in CELLS] for method in METHODS]
        words = ["all" if cell == list(kind.make) else ", ".join(cell) or "no meaning" for cell in cells]
        lines.append(f"| {kind.name}: {', '.join(kind.make)} | {' | '.join(words)} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> its tiny model, made once."""
    made: dict[str, Path] = {}

    def folder(family):
        if family not in made:
            made[family] = Path(KIND_OF[family].make[family](tmp_path_factory.mktemp("family") / "model"))
        return made[family]

    return folder


def ours(modality, items, settings, **told):
    shown = {"images": [item.condition or () for item in items]} if items[0].media[0].__class__ is Text else {}
    prompts = [item.prompt for item in items]
    return modality.generate(prompts, seeds=range(len(items)), **settings, **shown, **told)


def plain(folder, trained, items, settings, medium):
    """What diffusers, or transformers with PEFT, makes with the adapter; no word of ours but how media are written."""
    if medium == "answer":
        return answers(folder, trained, items, settings)
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(str(trained), weight_name="pytorch_lora_weights.safetensors")
    else:  # its LoRA is PEFT's
        part = "unet" if hasattr(pipeline, "unet") else "transformer"
        PeftModel.from_pretrained(getattr(pipeline, part), trained)  # the layers are put into the network itself
    told = settings | ({"output_type": "pil"} if medium != "sound" else {})
    if medium == "sound":  # one by one: AudioLDM2's language model hears of the padding of a batch
        return [
            np.asarray(pipeline(item.prompt, generator=torch.Generator().manual_seed(n), **told)[0][0])
            for n, item in enumerate(items)
        ]
    noise = [torch.Generator().manual_seed(n) for n in range(len(items))]
    return pipeline(prompt=[item.prompt for item in items], generator=noise, **told)[0]


def answers(folder, trained, items, settings):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), trained).eval()
    processor = AutoProcessor.from_pretrained(folder)
    said = []
    for item in items:
        parts = [{"type": "image", "image": one} for one in item.condition or ()]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": item.prompt}]}
        told = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = processor.apply_chat_template([turn], **told)
        tokens = model.generate(**inputs, do_sample=False, **settings)[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    return said


def close(made, theirs, modality):
    """Whether two media are the same but for the rounding of a float32: two loads of one model differ by as much."""
    if modality.medium == "picture":
        return np.abs(np.asarray(made, int) - np.asarray(theirs, int)).max() <= 1
    if modality.medium == "sound":
        wave, _ = sound_of(make_sound(theirs, made.sample_rate_hz), made.sample_rate_hz)
        return np.abs(sound_of(made, made.sample_rate_hz)[0] - wave).max() < 1e-3
    return made.source == make_video(theirs, made.fps).source if modality.medium == "video" else made == theirs


@pytest.mark.parametrize(("family", "method"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_two_steps_saved_and_loaded(family, method, folders, tmp_path):
    kind, folder = KIND_OF[family], folders(family)
    items, changes = kind.comparisons(3 if method in ("RankDPO", "SmPO") else 2), dict(kind.run.get(family, {}))
    if method == "PPD":
        write_users(tmp_path / "u.safetensors", Users({"user-0": torch.tensor([1.0, -1]), "user-1": torch.ones(2)}, {}))
        changes |= {"users": str(tmp_path / "u.safetensors"), "user_dropout": 0.0}
    run = Run(str(folder), "four", str(tmp_path / "run"), kind.objectives[method], 2, 1e-2, rank=2, **changes)
    modality = mmalign.load(folder, dtype=torch.float32)
    base = ours(modality, items, kind.settings[family]) if method == "PPD" else []
    trained = train(run, modality=modality, comparisons=items, say=lambda line: None)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    settings = kind.settings[family] | ({"temperature": 0.0} if modality.medium == "answer" else {})
    if method == "PPD":
        told = mmalign.load(folder, dtype=torch.float32, user_layers=trained)
        nobody = ours(told, items, kind.settings[family], user=torch.zeros(2))
        assert nobody == base
        return
    loaded = mmalign.load(folder, lora=trained, dtype=torch.float32)
    made = ours(loaded, items, settings)
    theirs = plain(folder, trained, items, kind.settings[family], modality.medium)
    assert all(close(one, other, modality) for one, other in zip(made, theirs, strict=True))


@pytest.mark.parametrize("family", ["PixArt-Sigma", "AudioLDM2"])
def test_a_run_starts_from_the_lora_of_another(family, folders, tmp_path):
    """Of families whose networks know no LoRA by themselves: what the run starts from is its reference."""
    kind, folder = KIND_OF[family], folders(family)
    run = Run(str(folder), "four", str(tmp_path / "first"), DiffusionDPO(beta=100), 1, 1e-2, rank=2)
    told = {"comparisons": kind.comparisons(2), "say": lambda line: None}
    first = train(run, modality=mmalign.load(folder, dtype=torch.float32), **told)
    second = replace(run, output_dir=str(tmp_path / "second"), lora=str(first))
    train(second, modality=mmalign.load(folder, lora=first, dtype=torch.float32), **told)
    row = json.loads((tmp_path / "second" / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert row["grad_norm"] > 0


def test_the_table_of_the_readme_is_this_one():
    assert table() in (Path(__file__).parents[2] / "README.md").read_text()
