"""Comparing two sides: pairing, pooling, and what is written."""

import json

import numpy as np
import pytest
import torch

from mmalign.evaluation.compare import Result, pool, score_sides
from mmalign.records import UserError
from mmalign.scoring.scorer import Scorer


class Brightness(Scorer):
    """A scorer whose medium is its own score."""

    def prepare(self, medium, *, condition=(), name=""):
        return float(medium)

    def judge(self, prepared, prompts):
        assert len(prepared) == len(prompts)
        return {"score": torch.tensor(prepared)}


def result(n=40, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=n)
    return score_sides([f"p{i}" for i in range(n)], base, base + shift, {"own": Brightness()})


def test_rows_are_paired():
    (row,) = result(shift=0.01).rows()
    assert (row.scorer, row.n, row.win_rate) == ("own", 40, 1.0)
    # Every difference is the same, so the paired interval has no width, however much the scores vary.
    assert (row.change, row.change_low, row.change_high) == pytest.approx((0.01, 0.01, 0.01), abs=1e-6)
    assert row.aligned_mean - row.base_mean == pytest.approx(row.change)


def test_interval_covers_the_win_rate():
    base, aligned = np.zeros(200), np.where(np.arange(200) < 130, 1.0, -1.0)
    (row,) = Result(tuple(map(str, range(200))), {"own": {"base": base, "aligned": aligned}}).rows()
    assert row.win_rate == 0.65
    half = 1.96 * np.sqrt(0.65 * 0.35 / 200)
    assert (row.win_low, row.win_high) == pytest.approx((0.65 - half, 0.65 + half), abs=0.01)


def test_winning_everything_is_not_certainty():
    (row,), (lost,) = result(20, shift=1).rows(), result(20, shift=-1).rows()
    assert (row.win_rate, row.win_high) == (1.0, 1.0)
    assert 1 - row.win_low == pytest.approx(0.1684, abs=1e-4)  # Clopper-Pearson, 20 of 20
    assert lost.win_high == pytest.approx(1 - row.win_low)


def test_pooled_seeds_share_their_prompts():
    one = result()
    pooled = pool([one, one, one])
    assert len(pooled.prompts) == 120
    (row,), (single,) = pooled.rows(), one.rows()
    assert (row.n, row.change_low) == (120, pytest.approx(single.change_low, abs=1e-3))


def test_json_holds_rows_and_scores():
    content = json.loads(result(3).to_json())
    assert content["rows"][0]["scorer"] == "own"
    assert len(content["scores"]["own"]["aligned"]) == len(content["prompts"]) == 3


@pytest.mark.parametrize(("prompts", "base", "aligned"), [(["a"], [1], [1, 2]), ([], [], [])])
def test_uneven_or_empty_sides_are_the_users_mistake(prompts, base, aligned):
    with pytest.raises(UserError, match="needs"):
        score_sides(prompts, base, aligned, {"own": Brightness()})


def test_pooling_different_scorers_is_refused():
    other = Result(("p",), {"else": {"base": np.zeros(1), "aligned": np.ones(1)}})
    with pytest.raises(UserError, match="same scorers"):
        pool([result(2), other])
