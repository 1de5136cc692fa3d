"""Training of scorers: what they learn, that they go on exactly, and what they leave on the disk."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from mmalign.records import Comparison, UserError
from mmalign.scoring import Card, load_scorer
from mmalign.scoring.clip import build
from mmalign.scoring.fit import ScorerRun, train_scorer
from mmalign.storage import sha256
from tests.scoring.test_reward_vlm import base, hpsv3  # noqa: F401 (fixtures)

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 4, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 4},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("start") / "tiny")


def tiny_clip(folder):
    """A scorer of HPSv2's layout with two transformers of four blocks."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    facts = {"name": "tiny", "family": "clip", "model": {"open_clip_config": "config.json"}}
    facts |= {"weights": {"file": "model.safetensors"}, "preprocess": {"size": 32}, "score": {"formula": "cosine"}}
    torch.manual_seed(0)
    model, _ = build(Card(folder=folder, **facts))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "card.yaml").write_text(yaml.safe_dump(facts))
    return folder


def picture(level: float, rng) -> Image.Image:
    """Noise that is the brighter the higher the level."""
    return Image.fromarray((rng.random((32, 32, 3)) * 120 + 120 * level).astype(np.uint8))


def data(count=24, members=3, seed=0) -> list[Comparison]:
    """Comparisons whose score and aspect `bright` is the brightness, and whose aspect `dark` is its opposite."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        levels = rng.permutation(5)[:members].astype(float)
        media = tuple(picture(level / 4, rng) for level in levels)
        aspects = {"bright": tuple(levels), "dark": tuple(-levels)}
        made.append(Comparison(f"{seed} {number}", f"prompt {number}", media, tuple(levels), aspects=aspects))
    return made


def run(clip, output, **settings) -> ScorerRun:
    settings = {"max_train_steps": 60, "learning_rate": 0.01, "checkpointing_steps": 100, **settings}
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2, "train_batch_size": 8}
    return ScorerRun(scorer=str(clip), dataset_name="data", output_dir=str(output), **{**fractions, **settings})


HEADS = {"head": "silu2", "aspects": ("bright", "dark"), "taps": ("transformer.resblocks.0",)}
OPEN = {"frozen_fraction": 0.5, "loss": "soft_cross_entropy", "learning_rate": 1e-3}


def test_heads_learn_their_aspects_and_the_folder_is_a_scorer(clip, tmp_path):
    seen = []
    folder = train_scorer(
        run(clip, tmp_path / "mine", **HEADS),
        data(),
        interval=lambda values, clusters: (seen.append(clusters), (0.1, 0.9))[1],
    )
    scorer = load_scorer(folder)
    judged = scorer.aspects([picture(level, np.random.default_rng(9)) for level in (0, 0.5, 1)], ["new"] * 3)
    assert (judged["bright"].diff() > 0).all()
    assert (judged["dark"].diff() < 0).all()
    torch.testing.assert_close(judged["score"], (judged["bright"] + judged["dark"]) / 2)

    card = scorer.card
    assert card.name == "mine"
    assert "bradley_terry, 60 steps of 8" in card.about
    assert card.licence.startswith("to be chosen")
    for part in (card.weights, card.score["head"]):
        assert sha256(folder / part["file"]) == part["sha256"]
    assert {path.name for path in folder.iterdir()} == {
        *("card.yaml", "config.json", "head.safetensors", "manifest.json", "model.safetensors"),
    }
    by_metric = {line["metric"]: line for line in card.published}
    assert len(by_metric) == 8  # two aspects by four accuracies, each under its name
    line = by_metric["accuracy of bright: imagereward, videoreward without ties"]
    assert line["value"] > 80
    assert line["interval"] == [10.0, 90.0]
    assert line["n"] == 3 * line["prompts"]
    assert all(len(set(clusters)) > 1 and clusters[0].startswith("prompt ") for clusters in seen)
    same = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, same[name]) for name, value in load_file(clip / "model.safetensors").items())


@pytest.mark.parametrize("settings", [HEADS, HEADS | {"head": "mlp"}, OPEN], ids=["heads", "dropout", "backbone"])
def test_interrupted_and_resumed_is_uninterrupted(clip, tmp_path, settings):
    settings = {**settings, "max_train_steps": 6, "checkpointing_steps": 2, "lr_warmup_steps": 3}
    whole = train_scorer(run(clip, tmp_path / "whole", **settings, lr_scheduler="cosine"), data())
    losses: list[float] = []

    def stop(step, loss):
        losses.append(loss)
        if step == 5:
            raise InterruptedError

    part = run(clip, tmp_path / "part", **settings, lr_scheduler="cosine")
    with pytest.raises(InterruptedError):
        train_scorer(part, data(), watch=stop)
    assert not (tmp_path / "part" / "scorer").exists()
    resumed = train_scorer(dataclasses.replace(part, resume_from_checkpoint=True), data())
    for file in ("head.safetensors", "model.safetensors"):
        if (whole / file).exists():
            assert sha256(whole / file) == sha256(resumed / file)
    other = dataclasses.replace(part, resume_from_checkpoint=True, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another run \(learning_rate differ\)"):
        train_scorer(other, data())
    with pytest.raises(UserError, match="holds a run already"):
        train_scorer(part, data())


@pytest.mark.parametrize("loss", ["bradley_terry", "bradley_terry_ties", "soft_cross_entropy", "listwise"])
def test_every_loss_learns(clip, tmp_path, loss):
    seen = []
    train_scorer(
        run(clip, tmp_path, **HEADS, loss=loss, max_train_steps=40),
        data(),
        watch=lambda step, value: seen.append(value),
    )
    assert np.mean(seen[-5:]) < 0.7 * np.mean(seen[:3])


def test_what_is_frozen_stays_and_the_scale_is_held(clip, tmp_path):
    """Half of each tower: its embeddings and first two blocks stay, the last two learn, in picture and in text."""
    settings = {**OPEN, "max_train_steps": 3, "max_logit_scale": math.log(14)}
    folder = train_scorer(run(clip, tmp_path, **settings), data())
    before, after = load_file(clip / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for tower in ("visual.transformer", "transformer"):
        for block in range(4):
            name = f"{tower}.resblocks.{block}.mlp.c_fc.weight"
            assert (name in changed) == (block >= 2), name
    assert {"visual.proj", "text_projection", "logit_scale"} <= changed
    assert not {name for name in changed if "embedding" in name or "conv1" in name}
    assert after["logit_scale"].item() <= math.log(14) + 1e-6
    assert load_scorer(folder).card.score["formula"] == "cosine-logit-scale"


def test_a_batch_is_the_mean_of_its_pairs_by_weight(clip, tmp_path):
    """Prompts with many comparisons weigh no more than others, if the run wants it; a weight of 0 is no comparison."""
    from mmalign.scoring import losses

    items = [
        dataclasses.replace(item, prompt="the same" if place else "another") for place, item in enumerate(data(3, 2))
    ]
    items[2] = dataclasses.replace(items[2], weight=0.0)
    settings = {
        **HEADS,
        "aspects": ("bright",),
        "train_batch_size": 3,
        "max_train_steps": 1,
        "per_prompt_weights": True,
    }
    settings |= {"validation_fraction": 0.0, "test_fraction": 0.0, "checkpointing_steps": 1}
    seen = []
    output = tmp_path / "run"
    train_scorer(run(clip, output, **settings), items, watch=lambda step, loss: seen.append(loss))
    heads = load_scorer(output / "start")
    each = []
    for item in items[:2]:
        a, b = heads.aspects(item.media, [item.prompt] * 2)["bright"]
        label = torch.tensor(float(item.score[0] > item.score[1]))
        each.append(losses.bradley_terry(a, b, label).item())
    assert seen[0] == pytest.approx((each[0] + 0.5 * each[1]) / 1.5, rel=1e-4)


def test_one_head_for_the_overall_score_and_a_test_set_of_its_own(clip, tmp_path):
    mine = run(clip, tmp_path, **(HEADS | {"aspects": ("overall",)}), test_dataset_name="other")
    folder = train_scorer(mine, data(), data(10, seed=5))
    (line, *_) = load_scorer(folder).card.published
    assert line["metric"].startswith("accuracy of overall: imagereward")
    assert line["prompts"] == 10
    assert line["value"] > 80


def test_held_out_prompts_are_whole_and_the_same_in_any_order(clip):
    from mmalign.scoring.fit import _split

    items = data(40) + data(40, seed=1)  # two comparisons a prompt
    parts = _split(run(clip, "out"), items)
    prompts = [{item.prompt for item in part} for part in parts]
    assert all(prompts)
    assert sum(map(len, prompts)) == 40
    backwards = _split(run(clip, "out"), items[::-1])
    assert prompts == [{item.prompt for item in part} for part in backwards]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"aspects": ("bright", "loud"), "head": "linear"},
            r"comparison '0 0': has no aspect 'loud', but bright, dark",
        ),
        ({"head": "linear", "aspects": ("bright",), "taps": ("nowhere",)}, "no layer of taps"),
        ({}, "nothing of it would learn"),
        ({"resume_from_checkpoint": True}, "no whole checkpoint"),
        ({"frozen_fraction": 0.5, "soft_labels": True, "aspects": ("dark",)}, "soft_labels needs votes"),
        ({"frozen_fraction": 0.5, "loss": "uncertainty"}, "gives no sigma"),
        ({"frozen_fraction": 0.5, "aspects": ("bright",)}, "has no head for bright"),
        ({"rank": 4}, "rank is for scorers on a vision-language model"),
        ({"validation_fraction": 1.0}, "all prompts are held out"),
    ],
)
def test_what_cannot_be_is_one_sentence(clip, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_scorer(run(clip, tmp_path, **settings), data(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 1.0}, "k is 1.0"),
        ({"frozen_fraction": 2.0}, "frozen_fraction is 2.0"),
        ({"head": "linear"}, "aspects is empty"),
        ({"head": "linear", "aspects": ("score",)}, "the overall score's is overall"),
        ({"head": "linear", "aspects": ("x.y",)}, "holds no dot"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
    ],
)
def test_a_run_that_cannot_be(clip, settings, message):
    with pytest.raises(UserError, match=message):
        run(clip, "out", **settings)


def test_a_lora_on_a_vlm_is_merged_into_what_is_written(hpsv3, tmp_path):  # noqa: F811
    """HPSv3's layout and loss: adapters and head learn, and the folder scores as the trained network did."""
    folder = hpsv3[0]
    settings = {"loss": "uncertainty", "samples": 20, "rank": 2, "max_train_steps": 3, "train_batch_size": 2}
    settings |= {"validation_fraction": 0.0, "test_fraction": 0.0}
    seen = []
    mine = run(folder, tmp_path / "mine", **settings)
    new = load_scorer(train_scorer(mine, data(8, 2), watch=lambda step, loss: seen.append(loss)))
    assert all(map(math.isfinite, seen))
    before, after = load_scorer(folder), new
    changed = {
        name
        for name, value in before.chat.model.state_dict().items()
        if not torch.equal(value, after.chat.model.state_dict()[name])
    }
    assert changed
    assert all(any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj")) for name in changed)
    assert any(not torch.equal(before.head[name], after.head[name]) for name in before.head)


def test_blip_learns_with_its_own_head_and_with_new_ones(tmp_path):
    """ImageReward's layout: its MLP lies among its weights, aspect heads in a file of their own."""
    from tests.scoring.test_blip import load

    (tmp_path / "tiny").mkdir()
    before = load(tmp_path / "tiny")
    start = tmp_path / "tiny"
    few = {"max_train_steps": 2, "train_batch_size": 2, "validation_fraction": 0.0, "test_fraction": 0.0}
    for name, settings in {"own": {}, "new": {"head": "linear", "aspects": ("bright", "dark")}}.items():
        mine = run(start, tmp_path / name, frozen_fraction=0.5, **few, **settings)
        new = load_scorer(train_scorer(mine, data(6, 2)))
        old, now = before.model.state_dict(), new.model.state_dict()
        for tower in ("vision.encoder.layers", "text.encoder.layer"):
            changed = {key.split(".")[3] for key in old if tower in key and not torch.equal(old[key], now[key])}
            assert changed == {"1"}, tower  # of two blocks the first is frozen
        assert new.parts == settings.get("aspects", ())


def test_the_bundled_aspects_know_blur_in_order():
    """Five levels of blur on pictures of the embedded model for prompts that nothing was trained on."""
    import mmalign
    from mmalign.embedded import SAMPLING, path, prompts

    texts = prompts("test")[:6]
    made = mmalign.load(str(path())).generate(texts, seeds=range(7, 13), **SAMPLING)
    scorer = load_scorer("embedded-aspects")
    rows = []
    for radius in (2.2, 1.5, 1.0, 0.6, 0):
        blurred = [one.filter(ImageFilter.GaussianBlur(radius)) for one in made]
        rows.append(scorer.aspects(blurred, texts)["fidelity"])
    table = torch.stack(rows)  # [5, 6], worst first
    assert (table.mean(1).diff() > 0).all()
    assert (table.diff(dim=0) > 0).float().mean() > 0.8
    right, wrong = (scorer.aspects(made, asked)["prompt-following"] for asked in (texts, texts[::-1]))
    assert (right > wrong).sum() >= 5
