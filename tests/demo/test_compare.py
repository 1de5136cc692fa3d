import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from compare import Compare, Made, check, draw, table
from PIL import Image
from studio import Studio

import mmalign.embedded
from mmalign.media import make_sound, make_video
from mmalign.records import Text

ME = SimpleNamespace(session_hash="me")


def quiet(*_):
    pass


@pytest.fixture
def page(studio):
    return Compare(studio)


def given(**changes):
    """What the page sends, in order."""
    asked = {
        "prompt": "a red fox",
        "names": ["base", "aligned"],
        "scorers": ["embedded-hps"],
        "seed": 3,
        "count": 2,
        "steps": 2,
        "guidance": 2.0,
        "strength": 1.0,
        "picture": None,
    }
    return list((asked | changes).values())


def test_models_and_seeds_make_a_grid_with_scores(page, studio):
    grid, note, file = page.run(*given(), ME, quiet)
    assert [(made.name, made.seed) for made in grid] == [("base", 3), ("aligned", 3), ("base", 4), ("aligned", 4)]
    assert note == "Made 4. "
    for made in grid:
        alone = studio.make(made.name, "a red fox", made.seed, 2, 2.0)
        assert np.array_equal(np.asarray(Image.open(made.shown)), np.asarray(alone))
        said = studio.score([alone], "a red fox", ["embedded-hps"])["embedded-hps"][0]
        assert made.scores == {"embedded-hps": pytest.approx(said, rel=1e-4)}
    with zipfile.ZipFile(file) as archive:
        settings = json.loads(archive.read("settings.json"))
        first = archive.read(settings["media"][0]["file"])
        assert len(archive.namelist()) == 5
    assert first == Path(grid[0].shown).read_bytes()
    assert settings["seed"] == 3
    assert settings["strength"] == 1.0
    assert settings["models"]["aligned"]["lora"] == "aligned"
    assert settings["media"][3]["scores"] == grid[3].scores


def test_without_its_strength_a_lora_is_the_base(page):
    base, aligned = page.run(*given(count=1, strength=0.0), ME, quiet)[0]
    assert np.array_equal(np.asarray(Image.open(base.shown)), np.asarray(Image.open(aligned.shown)))


def test_answers_and_their_scorers(tmp_path):
    page = Compare(Studio(str(mmalign.embedded.path("vlm")), data_dir=tmp_path / "data"))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    grid, note, file = page.run(*given(names=["base"], count=1, picture=str(tmp_path / "red.png")), ME, quiet)
    assert [made.medium for made in grid] == ["answer"]
    assert note == "Made 1. embedded-hps: for other media, and not asked."
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("settings.json"))["media"][0]["answer"] == grid[0].shown


def test_cancel_ends_the_work_with_one_word(page, studio):
    def show(share, about):
        if share > 0.3:
            page.stop(ME)

    with pytest.raises(gr.Error, match="Cancelled"):
        page.run(*given(), ME, show)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "Write a prompt"),
        ({"prompt": "x" * 301}, "Write a prompt"),
        ({"seed": -1}, "Seed must be"),
        ({"seed": None}, "Seed must be"),
        ({"steps": 51}, "Steps must be"),
        ({"steps": "many"}, "Steps must be"),
        ({"guidance": float("nan")}, "Guidance must be"),
        ({"count": 5}, "Seeds must be"),
        ({"strength": 3}, "Strength must be"),
        ({"names": []}, "at least one model"),
        ({"names": ["base"] * 30}, "at most 24"),
        ({"names": ["/etc/passwd"]}, "no such model"),
        ({"scorers": ["hpsv2"]}, "no such scorer"),
        ({"picture": "/no/such.png"}, r"^.?such.png: no such picture"),
    ],
)
def test_limits_hold_for_any_client(page, changes, message):
    with pytest.raises(gr.Error, match=message):
        page.refuse(*given(**changes))
    with pytest.raises(gr.Error, match=message):
        page.run(*given(**changes), ME, quiet)


def test_check_gives_whole_numbers():
    assert check(" fox ", 3.0, 2.0, 1) == ("fox", 3, 2)


def test_scores_that_differ_look_different():
    low, high = {"one": 10.396}, {"one": 10.402}
    assert "| 10.396 |" in table(low, [high])
    assert "**10.402** ▲" in table(high, [low])
    assert "▲" not in table(low, [])
    assert "▲" not in table(low, [low])
    assert "<b>" not in table({"<b>": 1.0}, [])


def test_every_kind_of_medium_has_its_player(studio):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    media = {
        "picture": frames[0],
        "video": make_video(frames, 2),
        "sound": make_sound(np.zeros(1600, np.float32), 16_000),
        "answer": Text("<b>red</b>"),
    }
    with gr.Blocks() as page:
        draw([Made("m", 0, kind, studio.keep(medium, kind), {}) for kind, medium in media.items()])
    shown = [block for block in page.blocks.values() if (block.elem_id or "").startswith("compare-picture-")]
    assert [type(block).__name__ for block in shown] == ["Image", "Video", "Audio", "Textbox"]
    assert shown[3].value == "<b>red</b>"
