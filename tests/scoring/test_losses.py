"""Losses against sums done by hand, and against votes whose truth is known."""

import math

import numpy as np
import pytest
import torch

from mmalign.scoring import losses

A, B = torch.tensor([1.0, 0.5, -2.0]), torch.tensor([0.0, 0.5, 1.0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand():
    label = torch.tensor([1.0, 0.5, 0.25])
    expected = [-math.log(sigmoid(1)), math.log(2), -0.25 * math.log(sigmoid(-3)) - 0.75 * math.log(sigmoid(3))]
    torch.testing.assert_close(losses.bradley_terry(A, B, label), torch.tensor(expected))


def test_ties_by_hand():
    """Rao and Kupper in their own form: win e^a / (e^a + k e^b), and the three answers add up to one."""
    a, b, k = A.double(), B.double(), 5.0
    win, lose = a.exp() / (a.exp() + k * b.exp()), b.exp() / (b.exp() + k * a.exp())
    for label, chance in ((1.0, win), (0.0, lose), (0.5, 1 - win - lose)):
        labels = torch.full((3,), label, dtype=torch.float64)
        torch.testing.assert_close(losses.bradley_terry_ties(a, b, labels, k), -chance.log())
    equal = losses.bradley_terry_ties(a, a, torch.full((3,), 0.5, dtype=torch.float64), k)
    torch.testing.assert_close(torch.exp(-equal), torch.full((3,), 4 / 6, dtype=torch.float64))


@pytest.mark.parametrize("k", [2.0, 5.0])
def test_the_slope_of_votes_with_ties_is_found(k):
    """Votes are drawn from the model; the scores' scale that fits them best is 1, and without ties' model it is not."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 2, (2, 60_000))
    win, lose = 1 / (1 + k * np.exp(b - a)), 1 / (1 + k * np.exp(a - b))
    draw = rng.random(len(a))
    label = torch.from_numpy(np.where(draw < win, 1.0, np.where(draw < win + lose, 0.0, 0.5)))
    assert 0.1 < (label == 0.5).double().mean() < 0.7
    a, b = torch.from_numpy(a), torch.from_numpy(b)

    def fitted(loss):
        slope = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([slope], max_iter=50, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            value = loss(slope * a, slope * b).mean()
            value.backward()
            return value

        optimizer.step(closure)
        return slope.item()

    assert fitted(lambda a, b: losses.bradley_terry_ties(a, b, label, k)) == pytest.approx(1.0, abs=0.05)
    assert abs(fitted(lambda a, b: losses.bradley_terry_ties(a, b, label, k + 3)) - 1) > 0.05


def test_soft_cross_entropy_by_hand():
    """PickScore's: cross-entropy both ways, less log 2 where it is a tie; a tie scored as one costs nothing."""
    label = torch.tensor([0.7, 0.5, 0.0])
    found = losses.soft_cross_entropy(A, B, label)
    both = torch.stack([A, B], 1)
    expected = torch.nn.functional.cross_entropy(both, torch.stack([label, 1 - label], 1), reduction="none")
    torch.testing.assert_close(found, expected - torch.tensor([0.0, math.log(2), 0.0]))
    assert found[1].abs() < 1e-7


def test_uncertainty_is_bradley_terry_when_sure_and_seeded():
    label, sure, unsure = torch.ones(3), torch.full((3,), -20.0), torch.zeros(3)
    torch.testing.assert_close(losses.uncertainty(A, B, label, sure, sure), losses.bradley_terry(A, B, label))
    once = losses.uncertainty(A, B, label, unsure, unsure, seed=3)
    torch.testing.assert_close(once, losses.uncertainty(A, B, label, unsure, unsure, seed=3), rtol=0, atol=0)
    assert (once != losses.uncertainty(A, B, label, unsure, unsure, seed=4)).all()
    points, weights = np.polynomial.hermite_e.hermegauss(60)  # E f(z), z normal with variance 1 + 1
    for found, gap in zip(losses.uncertainty(A, B, label, unsure, unsure, samples=200_000), A - B, strict=True):
        z = gap.item() + math.sqrt(2) * points
        assert found.item() == pytest.approx((weights * np.log1p(np.exp(-z))).sum() / weights.sum(), abs=0.02)


def test_plackett_luce_by_hand():
    """Three in order 1, 2, 0: e^s1 / (e^s0 + e^s1 + e^s2) · e^s2 / (e^s0 + e^s2); another group adds its own."""
    s = torch.tensor([0.3, 1.0, -0.5, 2.0, 1.0], dtype=torch.float64)
    target, group = torch.tensor([0.0, 9.0, 4.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 8, 8])
    found = losses.listwise(s, target, group)
    e = s.exp()
    chance = e[1] / (e[0] + e[1] + e[2]) * e[2] / (e[0] + e[2])
    torch.testing.assert_close(found[:3].sum(), -chance.log())
    torch.testing.assert_close(found[3:].sum(), -torch.tensor(sigmoid(1.0), dtype=torch.float64).log())
    tied = losses.listwise(s[:3], torch.tensor([1.0, 1.0, 1.0]), group[:3])
    assert tied.abs().max() == 0  # nobody is better, so there is nothing to learn


def test_pairs_stay_in_their_group_and_know_ties():
    a, b, label = losses.pairs(torch.tensor([3.0, 1.0, 3.0, 5.0, 0.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert list(zip(a.tolist(), b.tolist(), label.tolist(), strict=True)) == [
        (0, 1, 1.0),
        (0, 2, 0.5),
        (1, 2, 0.0),
        (3, 4, 1.0),
    ]
    *_, share = losses.pairs(torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), soft=True)
    assert share.tolist() == [0.75]


@pytest.mark.parametrize("constant", [-5.0, 100.0])
def test_only_differences_count(constant):
    label, sigma = torch.tensor([1.0, 0.5, 0.0]), torch.zeros(3)
    for loss in (
        losses.bradley_terry,
        losses.bradley_terry_ties,
        losses.soft_cross_entropy,
        lambda a, b, label: losses.uncertainty(a, b, label, sigma, sigma),
    ):
        torch.testing.assert_close(loss(A + constant, B + constant, label), loss(A, B, label), atol=1e-4, rtol=1e-4)


def test_prompts_weigh_alike():
    assert losses.per_prompt(["a", "b", "a", "a"]).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])
