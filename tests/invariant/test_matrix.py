"""Every method on every kind of model: a few steps raise the margin on a fixed draw, and a run resumes bit for bit."""

import json
from dataclasses import replace

import pytest
import torch

import mmalign
from mmalign.data.users import Users, write_users
from mmalign.objectives import MMDPO, PPD, SFT, DiffusionDPO, InPO, MaPO, RankDPO, SmPO
from mmalign.records import Comparison, Text
from mmalign.surrogate import AnswerTokens, DDIMInversion, ReNoise, evaluate
from mmalign.training.loop import train
from mmalign.training.prepare import make_accelerator, make_optimizer, prepare_policy
from mmalign.training.run import Run
from mmalign.training.step import Step
from tests.conftest import picture
from tests.tiny import tiny_vlm

METHODS = {
    "DiffusionDPO": DiffusionDPO(beta=500),
    "MaPO": MaPO(),
    "SmPO": SmPO(beta=500, draw=ReNoise(steps=2)),
    "InPO": InPO(beta=500, draw=DDIMInversion(steps=3, eta=0.1)),
    "RankDPO": RankDPO(beta=500),
    "PPD": PPD(beta=500),
    "MMDPO": MMDPO(beta=500),
}
ON_TOKENS = {  # the others invert noise, or compare denoising errors: tests/invariant/test_refused.py
    "DiffusionDPO": DiffusionDPO(beta=0.1),
    "SmPO": SmPO(beta=0.1, draw=AnswerTokens()),
    "RankDPO": RankDPO(beta=0.1, draw=AnswerTokens()),
    "PPD": PPD(beta=0.1),
    "MMDPO": MMDPO(beta=0.1, gamma=0.25),
    "SFT": SFT(),
}
MODELS = {"epsilon": "tiny_sdxl", "v_prediction": "tiny_sd15", "flow": "tiny_sd3", "tokens": "tiny_qwen"}
quiet = {"say": lambda line: None}


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory):
    return tiny_vlm(tmp_path_factory.mktemp("tiny_qwen"))


def methods(model):
    return ON_TOKENS if model == "tokens" else METHODS


def lists(model, k=3):
    """Four ranked lists of k pictures, or of k answers about one."""

    def medium(number):
        return Text(f"{number % 7} of {number % 5}") if model == "tokens" else picture(number, size=(16, 16))

    return [
        Comparison(
            id=f"list-{i}",
            prompt=["a red fox", "red"][i % 2],
            media=tuple(medium(k * i + j) for j in range(k)),
            score=tuple((j + i) % k / (k - 0.5) for j in range(k)),
            user=f"user-{i % 2}",
            condition=(picture(i),) if model == "tokens" else None,
        )
        for i in range(4)
    ]


@pytest.fixture
def recipe(tmp_path):
    return Run(
        pretrained_model_name_or_path="",
        dataset_name="four lists",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=500),
        max_train_steps=3,
        learning_rate=2e-3,
        train_batch_size=4,
        rank=4,
        seed=3,
    )


@pytest.fixture
def told(recipe, tmp_path):
    """(method, model, changes) -> its run; PPD's knows two users, and trains their layers."""
    write_users(tmp_path / "users.safetensors", Users({"user-0": torch.tensor([1.0, -1]), "user-1": torch.ones(2)}, {}))

    def make(method, model, **changes):
        users = {"users": str(tmp_path / "users.safetensors"), "user_dropout": 0.0} if method == "PPD" else {}
        return replace(recipe, objective=methods(model)[method], **users, **changes)

    return make


# PPD trains user layers: neither a LoRA nor the whole network
CELLS = [
    (method, kind, model)
    for model in MODELS
    for method in methods(model)
    for kind in ("lora", "full")
    if (method, kind) != ("PPD", "full")
]


@pytest.mark.parametrize(("method", "kind", "model"), CELLS)
def test_the_margin_on_the_fixed_draw_rises(method, model, kind, told, request):
    use_lora = kind == "lora"
    modality = mmalign.load(request.getfixturevalue(MODELS[model]), dtype=torch.float32)
    run = told(method, model, use_lora=use_lora, learning_rate=2e-3 if use_lora else 2e-4)
    views, items = prepare_policy(modality, run), lists(model)
    optimizer, _ = make_optimizer(run, [p for p in modality.network.parameters() if p.requires_grad])
    step = Step(run, modality, views, make_accelerator(run))
    probe, feedback = step.probe(items, [0] * 4)
    win, lose = feedback.pairs()
    margins = []
    for _ in range(5):
        with torch.no_grad():
            logp = evaluate(modality, probe, (), use=views).logp["policy"]
        margins.append((logp[win] - logp[lose]).mean().item())
        step.backward(probe, feedback, 1 / step.terms(items), last=True)
        optimizer.step()
        optimizer.zero_grad()
    assert margins[-1] > margins[0]
    if "reference" in run.objective.needs or use_lora:  # adapters off or the frozen copy: still what the policy was
        with torch.no_grad(), views("reference"):
            again = probe.logp(modality.predict(probe, "reference"))
        assert (again[win] - again[lose]).mean().item() == pytest.approx(margins[0], rel=1e-5, abs=1e-7)


# What differs on tokens: a list's sum, a user beside the answer, an objective that asks the probe
TWICE = [*(("epsilon", method) for method in METHODS), *(("tokens", method) for method in ("RankDPO", "PPD", "MMDPO"))]


@pytest.mark.parametrize(("model", "method"), TWICE)
def test_two_pass_equals_plain_and_a_resumed_run_an_uninterrupted_one(model, method, told, request, tmp_path):
    def curve(name, **changes):
        modality = mmalign.load(request.getfixturevalue(MODELS[model]), dtype=torch.float64)
        run = told(method, model, output_dir=str(tmp_path / name), **changes)
        output = train(run, modality=modality, comparisons=lists(model, 8), **quiet)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [(row["loss"], row["grad_norm"]) for row in rows]

    whole = curve("whole")
    # Lists of eight with the memory of two samples
    two_pass = curve("two", backward="two-pass", rows_at_once=2)
    assert [x for row in two_pass for x in row] == pytest.approx([x for row in whole for x in row], rel=1e-6)
    curve("resumed", max_train_steps=1)
    assert curve("resumed", resume_from_checkpoint="latest") == whole
