import csv
import io
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import score
from score import Score, chart, pictures_of

import mmalign
from mmalign.records import UserError
from tests.conftest import picture

ME = SimpleNamespace(session_hash="me")
SCORERS = ["embedded-hps", "embedded-clip"]


def png(seed):
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def packed(path, members):
    """A zip file; a member's name may be a `ZipInfo`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A picture, one that is none, and a zip file of two and a text."""
    (tmp_path / "one.png").write_bytes(png(1))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    zipped = packed(tmp_path / "more.zip", [("in/two.png", png(2)), ("=three.png", png(3)), ("notes.txt", b"words")])
    return [str(tmp_path / "one.png"), str(tmp_path / "broken.png"), zipped]


def test_every_picture_gets_every_scorers_score(studio, files):
    shown, note, plot, sheet = Score(studio).run(files, " a red fox ", SCORERS, ME, lambda *_: None)
    alone = [mmalign.load_scorer(name).score([png(1), png(2), png(3)], ["a red fox"] * 3).tolist() for name in SCORERS]
    with open(sheet, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "prompt", *SCORERS]
    assert [row[0] for row in rows] == [
        "one.png",
        "in/two.png",
        "'=three.png",
    ]  # no formula
    for column, scores in enumerate(alone, start=2):
        assert [float(row[column]) for row in rows] == pytest.approx(scores, rel=1e-4)
    assert shown.value["headers"] == ["picture", *SCORERS]
    assert shown.value["data"][1][0] == "in/two.png"
    assert note.startswith("3 scored, 2 left out.")
    assert "broken.png: cannot be decoded" in note
    assert "notes.txt" in note
    assert len(plot.axes) == 2


def test_names_are_text_in_the_note(studio, tmp_path):
    files = [packed(tmp_path / "a.zip", [("<img src=x>.png", b"no picture"), ("ok.png", png(1))])]
    note = Score(studio).run(files, "fox", SCORERS[:1], ME, lambda *_: None)[1]
    assert "<img" not in note


def test_cancel_ends_the_work(studio, files):
    page = Score(studio)
    with pytest.raises(gr.Error, match="Cancelled"):
        page.run(files, "fox", SCORERS, ME, lambda *_: page.stop(ME))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "fox", SCORERS), "Drop pictures"),
        (([], "fox", SCORERS), "Drop pictures"),
        ((["a.png"], "fox", []), "choose a scorer"),
        ((["a.png"], "", SCORERS), "Write the prompt"),
        ((["a.png"], "x" * 301, SCORERS), "Write the prompt"),
        ((["a.png"], "fox", ["hpsv2"]), "no such scorer"),
    ],
)
def test_what_is_missing_is_said(studio, arguments, message):
    with pytest.raises(gr.Error, match=message):
        Score(studio).refuse(*arguments)


def test_nothing_that_can_be_scored(studio, files):
    with pytest.raises(gr.Error, match=r"Nothing was scored: broken.png"):
        Score(studio).run(files[1:2], "fox", SCORERS, ME, lambda *_: None)


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/etc/up.png", "..\\up.png"])
def test_zip_slip_is_refused(tmp_path, name):
    path = packed(tmp_path / "slip.zip", [("ok.png", png(1)), (name, png(2))])
    with pytest.raises(UserError, match=r"^slip.zip: .*points out of the zip file"):
        list(pictures_of([path]))
    assert sorted(tmp_path.rglob("*.png")) == []


def test_symlinks_in_a_zip_file_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(UserError, match=r"'link.png' points out"):
        list(pictures_of([packed(tmp_path / "a.zip", [(link, "/etc/passwd")])]))


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = packed(tmp_path / "bomb.zip", [("big.png", b"\0" * (score.MAX_UPLOAD + 1))])
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match="64 MB unpacked"):
        list(pictures_of([path]))


def test_a_member_larger_than_it_says_is_refused(tmp_path):
    path = packed(tmp_path / "liar.zip", [("big.png", b"\0" * 100_000)])
    content = bytearray(Path(path).read_bytes())
    for header, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the size unpacked, in both headers
        place = content.index(header) + at
        content[place : place + 4] = (10).to_bytes(4, "little")
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=r"^liar.zip: cannot be unpacked"):
        list(pictures_of([path]))


def test_encrypted_and_damaged_zip_files_are_refused(tmp_path):
    path = packed(tmp_path / "locked.zip", [("a.png", png(1))])
    content = bytearray(Path(path).read_bytes())
    for header, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + at] |= 1
    Path(path).write_bytes(content)
    (tmp_path / "none.zip").write_bytes(b"words")
    for file in (path, tmp_path / "none.zip"):
        with pytest.raises(UserError, match="without a password"):
            list(pictures_of([str(file)]))


def test_too_many_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "MAX_FILES", 3)
    path = packed(tmp_path / "a.zip", [(f"{n}.png", png(n)) for n in range(2)])
    assert len(list(pictures_of([path]))) == 2
    with pytest.raises(UserError, match="More than 3 pictures"):
        list(pictures_of([path, path]))
    many = packed(tmp_path / "b.zip", [(f"{n}.png", b"") for n in range(4)])
    with pytest.raises(UserError, match="more than 3 files"):
        list(pictures_of([many]))


def test_a_plot_has_a_panel_a_scorer_from_the_best_down():
    figure = chart(["a", "b$", "c"], {"one": [1.0, 3.0, 2.0], "two": [0.3, 0.2, 0.1]})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "c", r"b\$"]
    assert list(first.lines[0].get_xdata()) == [1.0, 2.0, 3.0]
    assert [label.get_text() for label in second.get_yticklabels()] == ["c", r"b\$", "a"]
    figure.canvas.draw()
    assert not chart([str(n) for n in range(40)], {"one": list(range(40))}).axes[0].get_yticks().size
