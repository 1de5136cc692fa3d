import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from studio import Stopped, Studio, entries

import mmalign
import mmalign.embedded
from mmalign.records import UserError

SETTINGS = {"steps": 2, "guidance": 2.0}


def pixels(picture):
    return np.asarray(picture).tolist()


def test_base_and_aligned_are_what_each_makes_alone(studio, tiny_sdxl, lora):
    settings = {"seeds": [3], "num_inference_steps": 2, "guidance_scale": 2.0}
    alone = mmalign.load(tiny_sdxl).generate(["a red fox"], **settings)[0]
    with_lora = mmalign.load(tiny_sdxl, lora=lora).generate(["a red fox"], **settings)[0]
    assert pixels(alone) != pixels(with_lora)
    for _ in range(2):  # in any order, again and again
        assert pixels(studio.make("aligned", "a red fox", 3, **SETTINGS)) == pixels(with_lora)
        assert pixels(studio.make("base", "a red fox", 3, **SETTINGS)) == pixels(alone)


def test_strength_goes_from_the_base_to_the_whole_adapter(studio):
    base, whole, half, none = (
        pixels(studio.make(name, "a red fox", 3, **SETTINGS, **told))
        for name, told in (
            ("base", {}),
            ("aligned", {"strength": 1.0}),
            ("aligned", {"strength": 0.5}),
            ("aligned", {"strength": 0.0}),
        )
    )
    assert none == base
    assert half not in (base, whole)
    assert pixels(studio.make("aligned", "a red fox", 3, **SETTINGS)) == whole


def test_two_adapters_share_one_base_and_stay_apart(tiny_sdxl, lora, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    save_file({name: -value for name, value in weights.items()}, other / "pytorch_lora_weights.safetensors")
    studio = Studio(str(tiny_sdxl), [str(lora), f"mine={other}"], data_dir=tmp_path)
    made = {name: pixels(studio.make(name, "a red fox", 3, **SETTINGS)) for name in studio.names}
    assert list(made) == ["base", "aligned", "mine"]
    alone = mmalign.load(tiny_sdxl, lora=other)
    settings = {"seeds": [3], "num_inference_steps": 2, "guidance_scale": 2.0}
    assert made["mine"] == pixels(alone.generate(["a red fox"], **settings)[0])
    assert made["aligned"] not in (made["mine"], made["base"])
    assert studio.modality_of("base") is studio.modality_of("mine")


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path):
    studio = Studio("no/such/model", data_dir=tmp_path)
    with pytest.raises(UserError, match="no/such/model"):
        studio.make("base", "a red fox", 0)


def test_names_of_the_start_up_list(tmp_path):
    found = entries("M", ["a/one", "two=b/one"], ["third=N+c/lora", "fourth=embedded"])
    assert [(entry.name, entry.source, entry.lora) for entry in list(found.values())[:4]] == [
        ("base", "M", None),
        ("one", "M", "a/one"),
        ("two", "M", "b/one"),
        ("third", "N", "c/lora"),
    ]
    assert found["fourth"].source.endswith("t2i")
    with pytest.raises(UserError, match="'one'"):
        entries("M", ["a/one", "b/one"], [])
    with pytest.raises(UserError, match="NAME=SOURCE"):
        entries("M", [], ["folder"])


@pytest.mark.parametrize("name", ["../../etc", "", "Base", "tiny_sdxl"])
def test_a_model_off_the_list_is_refused(studio, name):
    with pytest.raises(UserError, match="choose of base, aligned"):
        studio.make(name, "a red fox", 0)


def test_what_visitors_may_know_names_no_folder(studio, tmp_path):
    told = json.dumps([entry.about for entry in studio.entries.values()])
    assert "aligned" in told
    assert str(tmp_path.parent) not in told


def test_progress_counts_steps_and_ends_the_work(studio):
    shares = []
    studio.make("aligned", "a red fox", 0, 4, 2.0, progress=shares.append)
    assert shares == [0, 0.25, 0.5, 0.75]

    def show(share):
        if share >= 0.5:
            studio.stop("me")
            studio.stop("somebody else")

    with pytest.raises(Stopped), studio.job("me", show) as progress:
        studio.make("aligned", "a red fox", 0, 4, 2.0, progress=lambda share: (shares.append(share), progress(share)))
    assert shares[4:] == [0, 0.25, 0.5, 0.75]
    studio.stop("me")  # nothing runs any more
    assert studio.make("base", "a red fox", 0, 1, 2.0, progress=shares.append) is not None


def test_models_that_answer_take_a_picture(tmp_path):
    studio = Studio(str(mmalign.embedded.path("vlm")), data_dir=tmp_path)
    assert studio.entry("base").may_answer
    answer = studio.make("base", "Describe the picture.", 0, images=[Image.new("RGB", (64, 64), "red")])
    assert studio.keep(answer, "answer") == str(answer)


def test_media_are_kept_under_harmless_names(studio):
    picture = studio.make("base", "a red fox", 0, 1, 2.0)
    path = studio.keep(picture, "../../a/b c")
    assert path.startswith(str(studio.cache))
    assert path.endswith("/.._.._a_b_c.png")


def test_scorers_are_those_on_this_machine(studio):
    names = [card.name for card in studio.scorer_cards()]
    assert "embedded-hps" in names
    assert "hpsv2" not in names
    with pytest.raises(UserError, match="no such scorer"):
        studio.score([], "a red fox", ["hpsv2"])


def test_scores_do_not_depend_on_how_many_are_asked_at_once(studio, monkeypatch):
    pictures = [studio.make("aligned", "a red fox", seed, 1, 2.0) for seed in range(3)]
    at_once = studio.score(pictures, "a red fox", ["embedded-hps"])
    monkeypatch.setattr("studio.BATCH", 2)
    assert torch.tensor(studio.score(pictures, "a red fox", ["embedded-hps"])["embedded-hps"]).allclose(
        torch.tensor(at_once["embedded-hps"]), atol=1e-5
    )
    alone = mmalign.load_scorer("embedded-hps").score(pictures, ["a red fox"] * 3)
    assert alone.tolist() == at_once["embedded-hps"]


@pytest.mark.parametrize("size", [(5000, 10), (10, 5000)])
def test_large_pictures_are_refused_before_they_are_decoded(studio, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"^large.png: more than 4096"):
        studio.open(str(tmp_path / "large.png"))
