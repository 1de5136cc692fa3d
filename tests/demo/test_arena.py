import html
import json
import threading
import zipfile
from types import SimpleNamespace

import arena
import gradio as gr
import httpx
import pytest
from app import build
from studio import Studio

from mmalign.data.importers import read_comparisons
from mmalign.records import Sound, Text, Video

TOKEN, PROMPT, STATUS, MEDIA, NAMES = 0, 2, 3, slice(4, 8), slice(8, 12)  # of what a ballot fills


def visitor(name="session", username=None):
    return SimpleNamespace(session_hash=name, username=username)


@pytest.fixture
def page(studio):
    studio.sampling = {"num_inference_steps": 1, "guidance_scale": 1.0}
    page = arena.Arena(studio)
    page.prompts = ["a red fox", "a fox"]
    return page


def dealt(page, name="ann", ways=2, own=""):
    """What a visitor sees after Next, made if need be."""
    voter, wanted, *shown = page.deal(name, ways, own, visitor(name))
    return shown if isinstance(wanted, dict) else page.make(voter, ways, own, visitor(name), lambda *_: None)


def test_a_ballot_is_blind_until_the_vote(page):
    shown = dealt(page)
    assert shown[PROMPT] in page.prompts
    assert shown[NAMES] == ["?", "?", "", ""]
    assert all(picture.startswith('<img src="gradio_api/file=') for picture in shown[MEDIA][:2])
    assert "base" not in json.dumps(shown[:12])
    assert "aligned" not in json.dumps(shown[:12])
    said, *names = page.vote(shown[TOKEN], "2")
    assert "B > A" in said
    assert sorted(names[:2]) == ["aligned", "base"]
    (cast,) = page.votes.all()
    assert cast.models == tuple(names[:2])
    assert cast.places == (2, 1)
    assert cast.settings["num_inference_steps"] == 1


def test_the_next_waits_in_stock_and_is_made_once(page):
    made = []
    make, page.studio.make = page.studio.make, lambda *given, **named: made.append(given) or make(*given, **named)
    for _ in range(4):
        page.ahead("ann", 2, "", visitor())
    assert len(made) == 2 * arena.AHEAD  # two media a ballot, and no more than are waited for
    voter, wanted, *shown = page.deal("ann", 2, "", visitor())
    assert voter == "ann"
    assert isinstance(wanted, dict)  # nothing is asked for
    assert shown[TOKEN]
    assert [page.deal("ann", 2, "", visitor())[2 + TOKEN] for _ in range(2)] == [shown[TOKEN]] * 2
    assert len(made) == 2 * arena.AHEAD


def test_people_share_media_but_not_ballots_nor_their_own_prompts(page):
    first, second = dealt(page, "ann"), dealt(page, "bob")
    assert first[TOKEN] != second[TOKEN]
    assert {picture.split('"')[1] for picture in first[MEDIA][:2]} == {p.split('"')[1] for p in second[MEDIA][:2]}
    own = dealt(page, "ann", own="<b>mine</b> ")
    assert own[PROMPT] == "<b>mine</b>"  # a text box shows it, never as markup
    page.vote(own[TOKEN], "0")
    assert page.votes.all()[0].prompt == "<b>mine</b>"
    assert dealt(page, "bob")[PROMPT] in page.prompts


def test_who_signed_in_is_known_by_that(page):
    names = [page.check(voter, 2, "", visitor("s", user))[0] for voter, user in [("1", "u"), ("2", "u"), ("1", None)]]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("ways", "own", "message"),
    [(3, "", "two or four"), (4, "", "two or four"), (2, "x" * 301, "at most 300")],
)
def test_limits_hold_for_any_client(page, ways, own, message):
    with pytest.raises(gr.Error, match=message):
        page.deal("ann", ways, own, visitor())


def test_without_prompts_of_its_own_it_asks_for_one(studio):
    with pytest.raises(gr.Error, match="Write a prompt"):
        arena.Arena(studio).deal("ann", 2, "", visitor())


def test_four_are_ordered_one_by_one(tiny_sdxl, lora, tmp_path):
    loras = [f"{name}={lora}" for name in ("one", "two", "three")]
    page = arena.Arena(Studio(str(tiny_sdxl), loras, data_dir=tmp_path))
    names = page.studio.names
    page.votes.add("fox", {"seed": 0}, {name: page.votes.keep(name.encode(), "png") for name in names})
    page.prompts = ["fox"]
    shown = page.deal("ann", 4, "", visitor())[2:]
    assert all(shown[MEDIA])
    assert "C, A" in page.vote(shown[TOKEN], "31")[0]
    assert page.votes.all() == []
    said, *named = page.vote(shown[TOKEN], "314")
    assert "C > A > D > B" in said
    assert sorted(named) == sorted(names)
    assert page.votes.all()[0].places == (2, 4, 1, 3)


def test_a_ballot_that_is_not_open_is_said(page):
    with pytest.raises(gr.Error, match="not open"):
        page.vote("made up", "1")


def test_every_kind_of_medium_is_shown_and_a_text_as_text(page, tmp_path):
    (tmp_path / "answer.txt").write_text("<script>alert(1)</script>")
    assert arena.medium(tmp_path / "answer.txt", "A") == f"<pre>{html.escape('<script>alert(1)</script>')}</pre>"
    kinds = {"<video": Video(b"film"), "<audio": Sound(b"noise"), "<pre>": Text("words")}
    for start, medium in kinds.items():
        page.studio.make = lambda name, *_, medium=medium, **__: (
            Text(f"{medium}{name}") if isinstance(medium, Text) else type(medium)(medium.source + name.encode())
        )
        shown = dealt(page, start, own=start)  # or the next would be shown the first's
        assert all(player.startswith(start) for player in shown[MEDIA][:2])
        page.vote(shown[TOKEN], "x")


def test_models_that_make_the_same_leave_nothing_to_choose(page):
    page.studio.make = lambda *_, **__: Text("the same")
    with pytest.raises(gr.Error, match="nothing to choose"):
        dealt(page)


def test_cancel_ends_the_work(page):
    def make(*_, progress, **__):
        page.stop(visitor("ann"))
        progress(0.5)

    page.studio.make = make
    with pytest.raises(gr.Error, match="Cancelled"):
        dealt(page)
    assert page.votes.waiting(page.votes.voter("browser ann"), page.studio.names, 2) == 0


def test_board_and_export(page):
    with pytest.raises(gr.Error, match="vote first"):
        page.save()
    assert page.board()[0] == "0 votes of 0 people."
    for name, choice in (("ann", "1"), ("bob", "2"), ("cid", "0")):
        page.vote(dealt(page, name)[TOKEN], choice)
    about, models, people = page.board()
    assert about == "3 votes of 3 people."
    assert {row[0] for row in models} == {"base", "aligned"}
    assert [row[-1] for row in models] == [3, 3]
    assert {row[0] for row in people} == {page.votes.voter(f"browser {name}") for name in ("ann", "bob", "cid")}
    said, file = page.save()
    assert said.startswith("2 of 3 votes")
    assert "1 ties" in said
    assert str(page.studio.data_dir) not in said
    target = page.studio.fresh("unpacked")
    zipfile.ZipFile(file).extractall(target)
    assert len(read_comparisons(target).comparisons) == 2


def test_with_one_model_the_tab_says_what_is_missing(tiny_sdxl, tmp_path):
    shown = build(Studio(str(tiny_sdxl), data_dir=tmp_path)).get_config_file()["components"]
    texts = [one["props"].get("value") for one in shown]
    assert any("needs two models" in text for text in texts if isinstance(text, str))
    assert not any(one["props"].get("elem_id") == "arena-next" for one in shown)


def test_a_vote_never_waits_for_what_is_being_made(studio):
    votes = arena.Votes(studio.data_dir)
    files = {name: votes.keep(name.encode(), "png") for name in studio.names}
    votes.add("fox", {"seed": 0}, files, owner=votes.voter("browser ann"))
    _app, url, _ = build(studio).launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(votes.media)])
    held, done = threading.Event(), threading.Event()

    def generating():
        with studio.lock:
            held.set()
            done.wait(60)

    worker = threading.Thread(target=generating)
    worker.start()
    try:
        held.wait()
        ask = httpx.Client(base_url=url, timeout=30)
        shown = ask.post("/gradio_api/api/arena_next", json={"data": ["ann", 2, "fox"]}).json()["data"][2:]
        assert ask.get("/" + shown[4].split('"')[1]).content in (b"base", b"aligned")
        said = ask.post("/gradio_api/api/arena_vote", json={"data": [shown[0], "1"]}).json()["data"]
        assert sorted(said[1:3]) == ["aligned", "base"]
        assert worker.is_alive()
    finally:
        done.set()
        worker.join()
        gr.close_all()
    assert len(votes.all()) == 1
