"""SFT is the mean squared error of the best samples."""

import torch

from mmalign.objectives import SFT
from mmalign.surrogate import Cond, Feedback, Likelihood, NoisedProbe, VariancePreserving


def test_sft_is_the_mean_squared_error_of_the_winners():
    path = VariancePreserving(torch.linspace(0.99, 0.01, 10))
    x0, noise, prediction = torch.randn(3, 4, 2, 2, 2).unbind(0)
    probe = NoisedProbe(path, x0, torch.tensor([1, 1, 5, 5]), noise, Cond({}))
    feedback = Feedback(torch.tensor([7, 7, 9, 9]), torch.tensor([0.0, 1.0, 3.0, 2.0]))
    loss = SFT()(Likelihood({"policy": probe.logp(prediction)}), feedback)
    expected = (noise - prediction).square().flatten(1).mean(1)[[1, 2]]
    assert torch.allclose(loss, expected)
