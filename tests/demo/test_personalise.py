from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from personalise import NOBODY, Personalise, encoder
from studio import Studio

import mmalign
from mmalign.data.users import USERS_FILE, Users, read_users, write_users
from mmalign.modalities.user import layers, save_layers
from mmalign.personal import Choices
from tests.conftest import picture

VISITOR = SimpleNamespace(session_hash="visitor")
SAMPLING = (2, 2.0)


def silent(share):
    pass


def chosen(page, count):
    """Choices of somebody who takes the brighter picture."""
    choices = Choices()
    for number in range(count):
        sides = [picture(2 * number), picture(2 * number + 1)]
        brighter = int(np.mean(sides[1]) > np.mean(sides[0]))
        _, _, choices, _ = page.choose(("a fox", *sides), choices, brighter)
    return choices


@pytest.fixture(scope="module")
def tastes(tiny_sdxl, tmp_path_factory):
    """Folder of a run with users; its layers are not trained, but not nothing either."""
    folder = tmp_path_factory.mktemp("tastes") / "tastes"
    folder.mkdir()
    features = len(encoder()("a fox", picture(0), picture(1)))
    modality = mmalign.load(tiny_sdxl)
    modality.add_user_layers(features, 2)
    for parameter in layers(modality.network).values():
        torch.nn.init.normal_(parameter, std=0.5)
    save_layers(modality.network, folder)
    write_users(folder / USERS_FILE, Users({"trained": torch.ones(features)}, encoder().facts))
    return folder


@pytest.fixture
def page(tiny_sdxl, lora, tastes, tmp_path):
    return Personalise(Studio(str(tiny_sdxl), [str(lora), str(tastes)], data_dir=tmp_path / "data"))


def test_a_taste_is_made_named_and_stored(page):
    pair, left, right, prompt = page.pair("a red fox\n\n", ["base", "aligned"], *SAMPLING, VISITOR, silent)
    assert prompt == "a red fox"
    assert pair == (prompt, left, right)
    assert np.any(np.asarray(left) != np.asarray(right))
    shown, asked, choices, said = page.choose(pair, Choices(), 1)
    assert (shown, asked) == (None, "")
    assert "1 of at least 4" in said
    assert torch.equal(choices.embedding, page.choose((prompt, right, left), Choices(), 0)[2].embedding)

    with pytest.raises(gr.Error, match="3 choices so far; at least 4"):
        page.name("ann", chosen(page, 3))
    choices = chosen(page, 4)
    page.name(" ann ", choices)
    page.name("bob", replace(choices, embedding=-choices.embedding))
    users = read_users(page.file)
    assert torch.equal(users["ann"], choices.embedding)
    assert users.facts["encoder"] == "embedded-clip"
    assert page.listed()[0]["choices"] == ["ann", "bob"]
    assert page.listed()[1]["choices"] == [NOBODY, "ann", "bob"]
    with pytest.raises(gr.Error, match="already"):
        page.name("ann", choices)


@pytest.mark.parametrize("name", ["", None, "x" * 41, "<img src=x>", "../up", "a/b", "nobody", "1"])
def test_names_are_checked(page, name):
    with pytest.raises(gr.Error, match="A name has"):
        page.name(name, chosen(page, 4))
    assert not page.file.exists()


def test_pictures_for_a_taste_and_between_two(page):
    for name, sign in (("ann", 1), ("bob", -1)):
        write = Choices((), sign * chosen(page, 4).embedding)
        page.name(name, replace(write, parts=(0,) * 4))

    def made(one, other, weight):
        page.refuse_taste("tastes", one, other, weight, "a red fox", 3, *SAMPLING)
        return page.generate("tastes", one, other, weight, "a red fox", 3, *SAMPLING, VISITOR, silent)

    plain, ann = made("ann", NOBODY, 0.5)
    base = mmalign.load(page.studio.entry("base").source)
    expected = base.generate(["a red fox"], seeds=[3], num_inference_steps=2, guidance_scale=2.0)[0]
    assert np.array_equal(plain, expected)
    assert np.any(np.asarray(ann["value"]) != np.asarray(plain))
    assert ann["label"] == "For ann"
    assert np.array_equal(made("ann", "bob", 0)[1]["value"], ann["value"])
    bob = made("bob", NOBODY, 0)[1]["value"]
    assert np.array_equal(made("ann", "bob", 1)[1]["value"], bob)
    assert made("ann", "bob", 0.25)[1]["label"] == "For 75% ann, 25% bob"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "base"}, "cannot be told whom"),
        ({"one": NOBODY}, "a taste of the list"),
        ({"one": None}, "a taste of the list"),
        ({"model": "/etc"}, "no such model"),
        ({"one": "carol"}, "a taste of the list"),
        ({"other": "carol"}, "a taste of the list"),
        ({"other": "ann", "weight": float("nan")}, "between 0 and 1"),
        ({"prompt": ""}, "Write a prompt"),
        ({"steps": 1000}, "Steps must be"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(page, change, message):
    page.name("ann", chosen(page, 4))
    asked = {"model": "tastes", "one": "ann", "other": NOBODY, "weight": 0.5, "prompt": "a fox", "seed": 0}
    asked |= {"steps": 2, "guidance": 2.0}
    page.refuse_taste(**asked)
    for handler in (page.refuse_taste, lambda **asked: page.generate(**asked, request=VISITOR, show=silent)):
        with pytest.raises(gr.Error, match=message):
            handler(**(asked | change))


def test_a_model_of_another_encoder_is_refused(page, tastes):
    page.name("ann", chosen(page, 4))
    write_users(page.file, Users(read_users(page.file).vectors, {"encoder": "another"}))
    with pytest.raises(gr.Error, match="another encoder"):
        page.refuse_taste("tastes", "ann", NOBODY, 0.5, "a fox", 0, *SAMPLING)


@pytest.mark.parametrize(
    ("prompts", "names", "message"),
    [("\n", ["base"], "at most 50 prompts"), ("fox\n" * 51, ["base"], "at most 50 prompts"),
     ("x" * 301, ["base"], "Write a prompt"), ("fox", [], "Choose a model"), ("fox", ["/etc"], "no such model")],
)  # fmt: skip
def test_pairs_are_of_listed_models_and_short_prompts(page, prompts, names, message):
    with pytest.raises(gr.Error, match=message):
        page.pair(prompts, names, *SAMPLING, VISITOR, silent)


def test_a_choice_needs_a_pair(page):
    with pytest.raises(gr.Error, match="Ask for a pair"):
        page.choose(None, Choices(), 0)
    with pytest.raises(gr.Error, match="are enough"):
        page.choose(("", picture(0), picture(1)), Choices((0,) * 200), 0)


def test_cancel_ends_the_work_at_its_next_step(page):
    told = []

    def stop(share):
        told.append(share)
        assert page.no_pair(VISITOR) == (None, None, None, "")

    with pytest.raises(gr.Error, match="Cancelled"):
        page.pair("fox", ["base"], 10, 2.0, VISITOR, stop)
    assert len(told) == 1
