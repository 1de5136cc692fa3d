"""The scorers that ship: on held-out combinations they judge what their cards say they judge."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmalign.embedded import scenes
from mmalign.evaluation.metrics import win_rate
from mmalign.scoring import load_scorer

SCENES = scenes.random_scenes(64, seed=11, split="test")
CAPTIONS = [scenes.caption(s) for s in SCENES]


@pytest.fixture(scope="module", params=["embedded-clip", "embedded-hps", "embedded-heldout"])
def scorer(request):
    return load_scorer(request.param)


def scores(scorer, made, captions=CAPTIONS):
    return scorer.score([Image.fromarray(scenes.render(s)) for s in made], captions).numpy()


def of_finish(q):
    return [replace(s, q=q) for s in SCENES]


def test_size(scorer):
    size = sum(path.stat().st_size for path in scorer.card.folder.iterdir())
    assert size < (2 if scorer.card.name == "embedded-heldout" else 4.5) * 2**20


def test_the_right_picture_beats_another_scene(scorer):
    others = of_finish(0.5)[1:] + of_finish(0.5)[:1]
    assert win_rate(scores(scorer, others), scores(scorer, of_finish(0.5))) > 0.95


@pytest.mark.parametrize("attribute", ["noun", "colour"])
def test_a_wrong_attribute_costs(scorer, attribute):
    values = list(dict.fromkeys(getattr(s, attribute) for s in SCENES))
    following = dict(zip(values, values[1:] + values[:1], strict=True))
    wrong = [replace(s, **{attribute: following[getattr(s, attribute)]}) for s in of_finish(0.5)]
    assert win_rate(scores(scorer, wrong), scores(scorer, of_finish(0.5))) > 0.8


def test_who_likes_finish_and_who_is_blind_to_it(scorer):
    dull, vivid = scores(scorer, of_finish(0.2)), scores(scorer, of_finish(0.9))
    if scorer.card.name == "embedded-clip":
        assert abs(np.mean(vivid - dull)) < 0.5 * np.std(dull)
    else:
        assert win_rate(dull, vivid) > 0.95


def test_preference_does_not_hang_on_the_ground():
    hps = load_scorer("embedded-hps")
    nouns = scenes.NOUNS[:12]
    means = {}
    for q in (0.3, 0.5, 0.7):
        for colour in scenes.COLOURS:
            made = [scenes.Scene(noun, colour, q=q, seed=i) for i, noun in enumerate(nouns)]
            means[q, colour] = scores(hps, made, [scenes.caption(s) for s in made]).mean()
    at = {q: np.array([means[q, colour] for colour in scenes.COLOURS]) for q in (0.3, 0.5, 0.7)}
    unit = (at[0.7].mean() - at[0.3].mean()) / 0.4  # score of the whole range of finish
    assert np.ptp(at[0.5]) < 0.2 * unit
