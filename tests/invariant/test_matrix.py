"""Every method on every kind of model: a few steps raise the margin on a fixed draw, and a run resumes bit for bit."""

import json
from dataclasses import replace

import pytest
import torch

import mmalign
from mmalign.data.users import Users, write_users
from mmalign.objectives import PPD, DiffusionDPO, InPO, MaPO, RankDPO, SmPO
from mmalign.records import Comparison
from mmalign.surrogate import DDIMInversion, ReNoise, evaluate
from mmalign.training.loop import train
from mmalign.training.prepare import make_accelerator, make_optimizer, prepare_policy
from mmalign.training.run import Run
from mmalign.training.step import Step
from tests.conftest import picture

METHODS = {
    "DiffusionDPO": DiffusionDPO(beta=500),
    "MaPO": MaPO(),
    "SmPO": SmPO(beta=500, draw=ReNoise(steps=2)),
    "InPO": InPO(beta=500, draw=DDIMInversion(steps=3, eta=0.1)),
    "RankDPO": RankDPO(beta=500),
    "PPD": PPD(beta=500),
}
MODELS = {"epsilon": "tiny_sdxl", "v_prediction": "tiny_sd15", "flow": "tiny_sd3"}
quiet = {"say": lambda line: None}


def lists(k=3):
    """Four ranked lists of k pictures."""
    return [
        Comparison(
            id=f"list-{i}",
            prompt=["a red fox", "red"][i % 2],
            media=tuple(picture(k * i + j, size=(16, 16)) for j in range(k)),
            score=tuple((j + i) % k / (k - 0.5) for j in range(k)),
            user=f"user-{i % 2}",
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
    """(method, changes) -> its run; PPD's knows two users, and trains their layers."""
    write_users(tmp_path / "users.safetensors", Users({"user-0": torch.tensor([1.0, -1]), "user-1": torch.ones(2)}, {}))

    def make(method, **changes):
        users = {"users": str(tmp_path / "users.safetensors"), "user_dropout": 0.0} if method == "PPD" else {}
        return replace(recipe, objective=METHODS[method], **users, **changes)

    return make


# PPD trains user layers: neither a LoRA nor the whole network
WEIGHTS = [(method, kind) for method in METHODS for kind in ("lora", "full") if (method, kind) != ("PPD", "full")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("method", "kind"), WEIGHTS)
def test_the_margin_on_the_fixed_draw_rises(method, model, kind, told, request):
    use_lora = kind == "lora"
    modality = mmalign.load(request.getfixturevalue(MODELS[model]), dtype=torch.float32)
    run = told(method, use_lora=use_lora, learning_rate=2e-3 if use_lora else 2e-4)
    views, items = prepare_policy(modality, run), lists()
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


@pytest.mark.parametrize("method", METHODS)
def test_two_pass_equals_plain_and_a_resumed_run_an_uninterrupted_one(method, told, request, tmp_path):
    def curve(name, **changes):
        modality = mmalign.load(request.getfixturevalue("tiny_sdxl"), dtype=torch.float64)
        run = told(method, output_dir=str(tmp_path / name), **changes)
        output = train(run, modality=modality, comparisons=lists(8), **quiet)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [(row["loss"], row["grad_norm"]) for row in rows]

    whole = curve("whole")
    # Lists of eight with the memory of two samples
    two_pass = curve("two", backward="two-pass", rows_at_once=2)
    assert [x for row in two_pass for x in row] == pytest.approx([x for row in whole for x in row], rel=1e-6)
    curve("resumed", max_train_steps=1)
    assert curve("resumed", resume_from_checkpoint="latest") == whole
