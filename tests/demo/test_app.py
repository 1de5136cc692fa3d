import importlib.util

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client
from peft import LoraConfig

import mmalign
from mmalign.scoring.scorer import Card

spec = importlib.util.spec_from_file_location("mmalign_demo", mmalign.bundled("demo") / "app.py")
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)


class Brightness:
    def score(self, media, prompts):
        return torch.tensor([np.asarray(picture).mean() for picture in media])


@pytest.fixture
def one_scorer(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "list_scorers", lambda: [Card("brightness", "clip", tmp_path)])
    monkeypatch.setattr(app.mmalign, "load_scorer", lambda folder: Brightness())


@pytest.fixture
def lora(tiny_sdxl, tmp_path):
    modality = mmalign.load(tiny_sdxl)
    config = LoraConfig(r=2, target_modules=modality.lora_targets(), init_lora_weights=False)
    modality.network.add_adapter(config, "policy")
    modality.save(tmp_path / "lora")
    return tmp_path / "lora"


def pixels(picture):
    return np.asarray(picture).tolist()


def test_base_and_aligned_differ_only_by_the_adapter(tiny_sdxl, lora, one_scorer):
    compare = app.Compare(tiny_sdxl, lora)
    base, aligned, base_scores, aligned_scores = compare("a red fox", 3, 2, 2.0)
    settings = {"seeds": [3], "num_inference_steps": 2, "guidance_scale": 2.0}
    assert pixels(base) == pixels(mmalign.load(tiny_sdxl).generate(["a red fox"], **settings)[0])
    assert pixels(aligned) == pixels(mmalign.load(tiny_sdxl, lora=lora).generate(["a red fox"], **settings)[0])
    assert pixels(base) != pixels(aligned)
    assert ("▲" in base_scores) != ("▲" in aligned_scores)
    assert pixels(compare("a red fox", 3, 2, 2.0)[0]) == pixels(base)


def test_scores_that_differ_look_different():
    scores = {"one": [10.396, 10.402]}
    assert "10.396" in app.table(scores, 0)
    assert "**10.402** ▲" in app.table(scores, 1)


def test_without_a_lora_the_page_says_so(tiny_sdxl, one_scorer):
    base, aligned, base_scores, note = app.Compare(tiny_sdxl)("a red fox", 3, 2, 2.0)
    assert base is not None
    assert aligned is None
    assert "brightness" in base_scores
    assert "--lora" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 0, 1, 1), "Write a prompt"),
        (("x" * 301, 0, 1, 1), "Write a prompt"),
        (("fox", -1, 1, 1), "Seed must be"),
        (("fox", None, 1, 1), "Seed must be"),
        (("fox", 0, 51, 1), "Steps must be"),
        (("fox", 0, 1, float("nan")), "Guidance must be"),
    ],
)
def test_limits_hold_for_any_client(arguments, message):
    with pytest.raises(gr.Error, match=message):
        app.check(*arguments)


def test_the_page_answers_on_this_machine_alone(tiny_sdxl, lora, one_scorer):
    _, url, shared = app.launch(tiny_sdxl, lora, prevent_thread_lock=True, quiet=True)
    try:
        assert url.startswith("http://127.0.0.1:")
        assert shared is None
        base, aligned, *scores = Client(url, verbose=False).predict("a red fox", 3, 2, 2, api_name="/compare")
        assert base
        assert aligned
        assert "▲" in "".join(scores)
    finally:
        gr.close_all()
