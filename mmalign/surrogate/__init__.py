"""The likelihood surrogate: the one interface between models, objectives and the trainer."""

from mmalign.surrogate.draws import AnswerTokens, DDIMInversion, FreshNoise, ReNoise
from mmalign.surrogate.likelihood import Cond, Draw, Feedback, Keys, Likelihood, Probe, evaluate
from mmalign.surrogate.paths import Path, RectifiedFlow, VariancePreserving, VDiffusion
from mmalign.surrogate.probes import NoisedProbe, TokenProbe, TransitionProbe

__all__ = [
    "AnswerTokens",
    "Cond",
    "DDIMInversion",
    "Draw",
    "Feedback",
    "FreshNoise",
    "Keys",
    "Likelihood",
    "NoisedProbe",
    "Path",
    "Probe",
    "ReNoise",
    "RectifiedFlow",
    "TokenProbe",
    "TransitionProbe",
    "VDiffusion",
    "VariancePreserving",
    "evaluate",
]
