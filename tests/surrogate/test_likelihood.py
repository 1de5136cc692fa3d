"""Feedback, conditions, probes and evaluate()."""

from contextlib import contextmanager

import pytest
import torch

from mmalign.surrogate import (
    Cond,
    Feedback,
    NoisedProbe,
    TokenProbe,
    TransitionProbe,
    VariancePreserving,
    evaluate,
)

PATH = VariancePreserving(torch.linspace(0.999, 0.005, 1000))


def test_pairs_stay_in_their_group_and_leave_ties_out():
    feedback = Feedback(torch.tensor([1, 1, 1, 2, 2]), torch.tensor([0.0, 2.0, 2.0, 1.0, 0.0]))
    win, lose = feedback.pairs()
    assert sorted(zip(win.tolist(), lose.tolist(), strict=True)) == [(1, 0), (2, 0), (3, 4)]


def test_condition_rows_dropout_and_views():
    cond = Cond(
        {"embeds": torch.arange(6.0).reshape(3, 2), "patches": [1, 2, 3], "user": torch.ones(3, 1)},
        frozenset({"user"}),
    )
    assert cond.rows([2, 0])["patches"] == [3, 1]
    dropped = cond.where(torch.tensor([False, True, False]), {"embeds": torch.full((1, 2), -1.0), "patches": [9]})
    assert dropped["embeds"].tolist() == [[0, 1], [-1, -1], [4, 5]]
    assert dropped["patches"] == [1, 9, 3]
    assert "user" in cond.view("policy")
    assert "user" not in cond.view("reference")
    both = Cond.cat([cond.rows(slice(0, 1)), cond.rows(slice(1, 3))])
    assert torch.equal(both["embeds"], cond["embeds"])
    assert both["patches"] == [1, 2, 3]
    assert both.policy_only == cond.policy_only


def test_half_precision_errors_are_computed_in_float32():
    x0, noise = torch.randn(2, 2, 4, 8, 8).unbind(0)
    probe = NoisedProbe(PATH, x0, torch.tensor([3, 700]), noise, Cond({}))
    prediction = (noise + 0.3 * torch.randn_like(noise)).bfloat16()
    assert probe.logp(prediction).dtype == torch.float32
    assert torch.equal(probe.logp(prediction), probe.logp(prediction.float()))
    assert probe.logp(prediction.double()).dtype == torch.float64


def test_token_probe_sums_answer_tokens_and_batches_by_rows():
    logits, tokens = torch.randn(2, 5, 11, dtype=torch.float64), torch.randint(0, 11, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    probe = TokenProbe(tokens, mask, Cond({}))
    logp = logits.log_softmax(-1)
    expected = [sum(logp[n, i - 1, tokens[n, i]] for i in range(1, 5) if mask[n, i]) for n in range(2)]
    assert torch.allclose(probe.logp(logits), torch.stack(expected))
    assert torch.allclose(probe[1:2].logp(logits[1:2]), probe.logp(logits)[1:2])
    # The last K positions are enough, from the one that predicts the first answer token
    assert torch.allclose(probe[:1].logp(logits[:1, 1:]), probe.logp(logits)[:1])


def test_transition_probe_is_a_gaussian():
    x_t, prediction, x_s = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64).unbind(0)
    t, s, std = (
        torch.tensor([800, 500]),
        torch.tensor([700, 400]),
        torch.tensor([0.3, 0.2], dtype=torch.float64),
    )
    probe = TransitionProbe(PATH, x_t, x_s, t, s, std, Cond({}))
    gaussian = torch.distributions.Normal(PATH.move(prediction, x_t, t, s), std.reshape(-1, 1, 1, 1))
    assert torch.allclose(probe.logp(prediction), gaussian.log_prob(x_s).flatten(1).mean(1))


class Network:
    """Counts who was asked in which order."""

    def __init__(self):
        self.weight = torch.ones((), requires_grad=True)
        self.asked = []

    def predict(self, probe, view):
        self.asked.append(view)
        return self.weight * probe.x_t


def test_the_policy_is_asked_last_with_gradient_and_known_views_not_at_all():
    probe = NoisedProbe(PATH, torch.randn(2, 4), torch.tensor([5, 5]), torch.randn(2, 4), Cond({}))
    network, entered = Network(), []

    @contextmanager
    def use(view):
        entered.append(view)
        yield

    likelihood = evaluate(network, probe, ("reference", "old"), use=use, known={"old": torch.zeros(2)})
    assert network.asked == entered == ["reference", "policy"]
    assert likelihood.logp["policy"].requires_grad
    assert not likelihood.logp["reference"].requires_grad
    assert torch.equal(likelihood.logp["old"], torch.zeros(2))
    assert torch.equal(likelihood.log_ratio, torch.zeros(2))
    with pytest.raises(KeyError):
        _ = evaluate(network, probe, ()).log_ratio
