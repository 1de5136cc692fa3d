"""SmPO's loss against the numbers that the official code gave (tests/golden/smpo.json)."""

import math

import pytest
import torch

from mmalign.objectives import DiffusionDPO, SmPO
from mmalign.records import Comparison
from mmalign.surrogate import AnswerTokens, Feedback, Likelihood, ReNoise
from mmalign.training.step import feedback_of
from tests.objectives.official import EPSILON, PAIRS, check_case, golden


def belief(p: float) -> Feedback:
    """Four pairs whose scores give the probability p that the first is better."""
    return Feedback(PAIRS.group, torch.tensor([math.log(p / (1 - p))] * 4 + [0.0] * 4, dtype=torch.float64))


@pytest.mark.parametrize("case", [c for c in golden("smpo")["cases"] if c["prob"] != 0.5], ids=lambda c: c["case"])
def test_official(case):
    check_case(case, SmPO(beta=case["beta"]), feedback=belief(case["prob"]))


@pytest.mark.parametrize("row", golden("smpo")["soft_label_vectors"], ids=lambda row: f"{row['prob']:.3f}")
def test_official_soft_labels_from_pickscores(row):
    """PickScore cosines, normalised by the recipe's score_scale, give the official strength and order of a pair."""
    scores = (row["ps_score_0"], row["ps_score_1"])
    item = Comparison(id="one", prompt="", media=("a", "b"), score=scores)
    feedback = feedback_of([item], (0.11543526500463486, 0.28201571106910706))
    assert max(feedback.score).item() == pytest.approx(row["norm_winner"], rel=1e-5)
    logp = torch.tensor([0.3, 0.1], requires_grad=True)
    loss = SmPO(beta=1.0)(Likelihood({"policy": logp, "reference": torch.zeros(2)}), feedback)
    if scores[0] == scores[1]:
        assert len(loss) == 0
        return
    win, lose = (0, 1) if row["ps_label_0"] else (1, 0)
    inside = row["weight_2p_minus_1_times_10"] * (logp[win] - logp[lose]).item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-inside)), rel=1e-5)


def test_equal_scores_give_exactly_no_gradient():
    logp = torch.randn(8, requires_grad=True)
    feedback = Feedback(PAIRS.group, torch.full((8,), 0.4))
    loss = SmPO(beta=5000)(Likelihood({"policy": logp, "reference": torch.zeros(8)}), feedback)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.equal(gradient, torch.zeros(8))


def test_a_constant_added_to_every_score_changes_nothing_and_the_gain_is_a_larger_beta():
    likelihood = Likelihood({"policy": torch.randn(8).double(), "reference": torch.randn(8).double()})
    feedback, moved = belief(0.6), Feedback(PAIRS.group, belief(0.6).score + 0.25)
    loss = SmPO(beta=2.0)(likelihood, feedback)
    assert torch.allclose(loss, SmPO(beta=2.0)(likelihood, moved))
    assert torch.allclose(loss, DiffusionDPO(beta=2.0 * 10 * (2 * 0.6 - 1))(likelihood, feedback))


def test_what_cannot_be_trained_is_refused():
    SmPO(beta=1).check(EPSILON, belief(0.7))
    assert isinstance(SmPO(beta=1).draw, ReNoise)
    with pytest.raises(ValueError, match="score the data"):
        SmPO(beta=1).check(EPSILON, PAIRS)
    with pytest.raises(ValueError, match="token model"):
        SmPO(beta=1).check(None, belief(0.7))
    SmPO(beta=1, draw=AnswerTokens()).check(None, belief(0.7))
    with pytest.raises(ValueError, match="NaN"):
        SmPO(beta=1).check(EPSILON, Feedback(torch.tensor([1, 1]), torch.tensor([0.3, math.nan])))
