"""One score of several scorers': the formulas, what is shared, and what goes wrong."""

import pytest
import torch
import yaml
from PIL import Image

from mmalign.records import UserError
from mmalign.scoring import ensemble, load_scorer
from mmalign.scoring.ensemble import fit_zscores, win_shares

CLIP, HPS, HELD_OUT = "embedded-clip", "embedded-hps", "embedded-heldout"
ZSCORES = [{"scorer": CLIP, "weight": 2, "mean": 3, "std": 4}, {"scorer": HPS, "mean": -1.5, "std": 0.5}]


def write(folder, combine, members, **changes):
    score = {"combine": combine, "members": [{"scorer": m} if isinstance(m, str) else m for m in members]}
    card = {"name": "both", "family": "ensemble", "judges": "image", "score": score}
    (folder / "card.yaml").write_text(yaml.safe_dump(card | changes))
    return folder


@pytest.fixture(scope="module")
def media():
    noise = torch.randint(0, 256, (6, 40, 50, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in noise]


PROMPTS = ["a red fox", "a boat", "a red fox", "a boat", "a red fox", "a boat"]


@pytest.fixture(scope="module")
def apart(media):
    return {name: load_scorer(name).score(media, PROMPTS) for name in (CLIP, HPS, HELD_OUT)}


def test_a_weighted_sum(tmp_path, media, apart):
    scorer = load_scorer(write(tmp_path, "weights", [{"scorer": CLIP, "weight": 0.25}, HPS]))
    parts = scorer.aspects(media, PROMPTS, batch_size=4)
    assert list(parts) == ["score", *scorer.parts] == ["score", CLIP, HPS]
    for name in (CLIP, HPS):
        torch.testing.assert_close(parts[name], apart[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(parts["score"], 0.25 * apart[CLIP] + apart[HPS], atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer.score(media, PROMPTS), parts["score"], atol=1e-5, rtol=0)
    assert scorer.card.batch_invariant
    assert scorer.score([], []).shape == (0,)


def test_zscores_are_those_of_the_card(tmp_path, media, apart):
    scorer = load_scorer(write(tmp_path, "zscores", ZSCORES))
    expected = 2 * (apart[CLIP] - 3) / 4 + (apart[HPS] + 1.5) / 0.5
    torch.testing.assert_close(scorer.score(media, PROMPTS), expected, atol=2e-5, rtol=0)
    alone = torch.cat([scorer.score([medium], [prompt]) for medium, prompt in zip(media, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, expected, atol=2e-5, rtol=0)


def test_zscores_are_fitted_once_and_stay(tmp_path, media, apart):
    members = [{"scorer": CLIP, "weight": 2}, HPS]
    scorer = load_scorer(write(tmp_path, "zscores", members, about="Ä", licence="MIT"))
    with pytest.raises(UserError, match=r"embedded-clip has no mean and std: call ensemble\.fit_zscores"):
        scorer.score(media, PROMPTS)
    fit_zscores(scorer, media, PROMPTS, batch_size=4)
    z = {name: (scores - scores.mean()) / scores.std(correction=0) for name, scores in apart.items()}
    expected = 2 * z[CLIP] + z[HPS]
    again = load_scorer(tmp_path)
    for one in (scorer, again):
        torch.testing.assert_close(one.score(media, PROMPTS), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.score(media[:1], PROMPTS[:1]), expected[:1], atol=1e-4, rtol=0)
    assert (again.card.about, again.card.licence) == ("Ä", "MIT")
    assert "model" not in yaml.safe_load((tmp_path / "card.yaml").read_text())


def test_zscores_need_media_that_differ(tmp_path, media):
    scorer = load_scorer(write(tmp_path, "zscores", [CLIP]))
    before = (tmp_path / "card.yaml").read_text()
    with pytest.raises(UserError, match="embedded-clip scores all 1 media alike"):
        fit_zscores(scorer, media[:1], PROMPTS[:1])
    assert (tmp_path / "card.yaml").read_text() == before
    with pytest.raises(UserError, match="means are for zscores"):
        fit_zscores(load_scorer(write(tmp_path, "wins", [CLIP])), media, PROMPTS)


def test_wins_are_counted_among_all_media_of_a_prompt(tmp_path, media, apart):
    scorer = load_scorer(write(tmp_path, "wins", [CLIP, HPS, HELD_OUT]))
    parts = scorer.aspects(media, PROMPTS, batch_size=2)  # no batch holds two media of one prompt
    for rows in ([0, 2, 4], [1, 3, 5]):
        lists = [apart[name][rows].tolist() for name in (CLIP, HPS, HELD_OUT)]
        assert parts["score"][rows].tolist() == pytest.approx(win_shares(lists))
    assert parts["score"].sum() == pytest.approx(3.0)  # no ties: half of the media's number
    assert parts.keys() == {"score", CLIP, HPS, HELD_OUT}
    assert not scorer.card.batch_invariant
    assert scorer.score([], []).shape == (0,)


def test_other_input_pictures_are_another_prompt(tmp_path, media):
    scorer = load_scorer(write(tmp_path, "wins", [HPS]))
    conditions = [("a.png",), ("a.png",), ("b.png",), ("b.png",)]
    shares = scorer.score(media[:4], ["p"] * 4, conditions=conditions)
    assert sorted(shares[:2].tolist()) == sorted(shares[2:].tolist()) == [0.0, 1.0]
    assert shares.tolist() != scorer.score(media[:4], ["p"] * 4).tolist()


def test_a_medium_alone_cannot_win(tmp_path, media):
    scorer = load_scorer(write(tmp_path, "wins", [HPS]))
    with pytest.raises(UserError, match="compares the media of a prompt with each other, and 'a boat' has one"):
        scorer.score(media[:3], PROMPTS[:3])
    with pytest.raises(UserError, match="has one"):
        scorer.judge([scorer.prepare(media[0])], ["a"])


def test_a_shared_preparation_is_made_once(tmp_path, media, monkeypatch):
    made = []
    scorer = load_scorer(write(tmp_path, "weights", [CLIP, HPS, HELD_OUT]))
    for name, member in scorer.scorers.items():
        prepare = member.prepare
        monkeypatch.setattr(member, "prepare", lambda *a, n=name, p=prepare, **k: made.append(n) or p(*a, **k))
    scorer.score(media, PROMPTS)
    assert made == [CLIP] * len(media)  # all three resize alike
    path = tmp_path / "bad.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png"):
        scorer.score([path], ["a"])


def test_scores_of_a_table_know_the_members(tmp_path, media):
    scorer = load_scorer(write(tmp_path, "weights", [CLIP, HPS]))
    assert scorer.card.model[HPS]["weights"]["sha256"]
    assert scorer.card.model[HPS]["score"]["formula"] == "head"


def test_a_member_may_lie_beside_the_card(tmp_path, media, apart):
    inner = tmp_path / "inner"
    inner.mkdir()
    card = yaml.safe_load((ensemble.bundled("scorers") / CLIP / "card.yaml").read_text())
    for part, field in (("model", "open_clip_config"), ("model", "merges"), ("weights", "file")):
        card[part][field] = str((ensemble.bundled("scorers") / CLIP / card[part][field]).resolve())
    (inner / "card.yaml").write_text(yaml.safe_dump(card | {"name": "mine"}))
    parts = load_scorer(write(tmp_path, "weights", ["inner", CLIP])).aspects(media, PROMPTS)
    torch.testing.assert_close(parts["mine"], apart[CLIP], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("combine", "members", "words"),
    [
        ("zscore", [CLIP], "combine must be one of weights, zscores, wins; did you mean 'zscores'"),
        ("weights", [], "score.members must be a list"),
        ("weights", [{"weight": 1}], "needs `scorer: NAME or FOLDER`"),
        ("weights", [{"scorer": CLIP, "wight": 1}], "field 'wight' too many; did you mean 'weight'"),
        ("weights", [{"scorer": CLIP, "weight": "2"}], "weight of member embedded-clip must be a finite number"),
        ("weights", [{"scorer": CLIP, "mean": 2}], "field 'mean' too many"),
        ("wins", [{"scorer": CLIP, "weight": 2}], "field 'weight' too many"),
        ("zscores", [{"scorer": CLIP, "mean": 0, "std": 0}], "std of member embedded-clip .* over 0"),
        ("weights", ["embeded-clip"], "no scorer 'embeded-clip'; did you mean"),
        ("weights", [CLIP, CLIP], "must differ"),
        ("weights", ["."], "is an ensemble itself"),
    ],
)
def test_mistakes_in_a_card(tmp_path, combine, members, words):
    with pytest.raises(UserError, match=words):
        load_scorer(write(tmp_path, combine, members))


def test_members_judge_what_the_card_says(tmp_path):
    with pytest.raises(UserError, match="judges audio, but its member embedded-clip image"):
        load_scorer(write(tmp_path, "weights", [CLIP], judges="audio"))


def test_win_shares():
    assert win_shares([[3.0, 1.0, 2.0], [1.0, 1.0, 2.0]]) == (0.5, 0.0, 0.75)
    for scores in ([[1.0]], [[1.0, 2.0], [1.0]], [[1.0, float("nan")]], []):
        with pytest.raises(UserError, match="mend"):
            win_shares(scores)
