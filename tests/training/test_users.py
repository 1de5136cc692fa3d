"""Training for users: the policy hears them, the reference does not, and everything else is as in any run."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import mmalign
from mmalign.data.users import Users, read_users, write_users
from mmalign.modalities import user as layers_of
from mmalign.objectives import PPD
from mmalign.records import UserError
from mmalign.training.loop import train
from mmalign.training.prepare import make_accelerator, prepare_policy
from mmalign.training.run import Run
from mmalign.training.step import Step


def quiet(line):
    pass


@pytest.fixture
def taken(pairs):
    """The twelve pairs, each of one of two users."""
    return [replace(pair, user=("ann", "bob")[i % 2]) for i, pair in enumerate(pairs)]


@pytest.fixture
def recipe(tiny_sdxl, tmp_path):
    users = {"ann": torch.tensor([1.0, 1.0, -1.0]), "bob": torch.tensor([-1.0, 1.0, 1.0])}
    write_users(tmp_path / "users.safetensors", Users(users, {"encoder": "by hand"}))
    return Run(
        pretrained_model_name_or_path=str(tiny_sdxl),
        dataset_name="twelve pairs",
        output_dir=str(tmp_path / "run"),
        objective=PPD(beta=2000),
        users=str(tmp_path / "users.safetensors"),
        max_train_steps=3,
        learning_rate=1e-2,
        train_batch_size=4,
        seed=7,
    )


def run_it(recipe, pairs, dtype=torch.float64, **changes):
    run = replace(recipe, **changes)
    modality = mmalign.load(run.pretrained_model_name_or_path, lora=run.lora, dtype=dtype)
    output = train(run, modality=modality, comparisons=pairs, say=quiet)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], output


def test_two_steps_raise_the_margin_on_the_fixed_draw_and_the_run_loads(recipe, taken, tiny_sdxl):
    base = {name: p.clone() for name, p in mmalign.load(tiny_sdxl, dtype=torch.float64).network.named_parameters()}
    rows, output = run_it(recipe, taken[:4], max_train_steps=2, user_dropout=0.0)
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, rel=1e-12)
    modality = mmalign.load(tiny_sdxl, user_layers=output, dtype=torch.float64)
    kept = {name: p for name, p in modality.network.named_parameters() if name in base}
    assert all(torch.equal(kept[name], base[name]) for name in base)
    run = replace(recipe, user_dropout=0.0)
    fresh = mmalign.load(tiny_sdxl, dtype=torch.float64)
    step = Step(run, fresh, prepare_policy(fresh, run), make_accelerator(run))
    margins = []
    for trained in (False, True):
        step.modality.network = modality.network if trained else fresh.network
        probe, feedback = step.probe(taken[:4], [0] * 4)
        win, lose = feedback.pairs()
        policy, reference = (probe.logp(step.modality.predict(probe, view)) for view in ("policy", "reference"))
        log_ratio = policy - reference
        margins.append((log_ratio[win] - log_ratio[lose]).mean().item())
    assert margins[0] == 0
    assert margins[1] > 0
    saved = read_users(output / "users.safetensors")
    assert saved.facts == {"encoder": "by hand"}
    assert torch.equal(saved["ann"], torch.tensor([1.0, 1.0, -1.0]))
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    assert "user_layers" in (output / "README.md").read_text()


def test_dropout_is_by_group_and_by_counter(recipe, taken):
    run = replace(recipe, user_dropout=0.5)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    step = Step(run, modality, prepare_policy(modality, run), make_accelerator(run))
    seen = [step.probe(taken, [draw] * 12)[0].cond["user"] for draw in range(8)]
    heard = torch.stack([user.abs().sum(1).reshape(12, 2) > 0 for user in seen])  # [draws, pairs, members]
    assert torch.equal(heard[..., 0], heard[..., 1])
    assert 0.3 < heard.double().mean() < 0.7
    again, _ = step.probe(taken[3:5], [2, 2])
    assert torch.equal(again.cond["user"], seen[2][6:10])
    assert "user" not in again.cond.view("reference")
    assert "user" in again.cond.view("policy")
    everyone = Step(replace(run, user_dropout=0.0), modality, step.views, step.accelerator)
    assert (everyone.probe(taken, [0] * 12)[0].cond["user"].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 2, "gradient_accumulation_steps": 2, "backward": "two-pass", "rows_at_once": 1},
        {"gradient_checkpointing": True, "cache_latents": True},
    ],
    ids=str,
)
def test_how_a_step_is_cut_does_not_matter(recipe, taken, changes, tmp_path):
    expected, _ = run_it(recipe, taken)
    rows, _ = run_it(recipe, taken, output_dir=str(tmp_path / "other"), **changes)
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-6)


def test_resumed_is_uninterrupted_bit_for_bit(recipe, taken, tmp_path):
    expected, whole = run_it(recipe, taken, output_dir=str(tmp_path / "whole"))
    run_it(recipe, taken, max_train_steps=2)
    rows, output = run_it(recipe, taken, resume_from_checkpoint="latest")
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    ours, theirs = (load_file(folder / layers_of.LAYERS_FILE) for folder in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_lora_under_the_users_stays_and_is_the_reference(recipe, pairs, taken, tmp_path):
    from mmalign.objectives import DiffusionDPO

    lora_run = {"objective": DiffusionDPO(2000), "users": None, "rank": 2, "output_dir": str(tmp_path / "lora")}
    _, lora = run_it(recipe, pairs, **lora_run)
    rows, output = run_it(recipe, taken, lora=str(lora))
    assert rows[0]["loss"] == pytest.approx(0.6931471805599453, rel=1e-12)
    before, after = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (lora, output))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_input_is_one_sentence(recipe, pairs, taken):
    with pytest.raises(UserError, match="PPD needs users"):
        replace(recipe, users=None)
    with pytest.raises(UserError, match="frozen weights only"):
        replace(recipe, use_lora=False)
    with pytest.raises(UserError, match="user_dropout is 1"):
        replace(recipe, user_dropout=1.0)
    with pytest.raises(UserError, match=r"PPD cannot be trained on twelve pairs: a comparison names no user"):
        run_it(recipe, pairs)
    with pytest.raises(UserError, match=r"no embedding of user 'anne'; did you mean 'ann'\?"):
        run_it(recipe, [*taken[:11], replace(taken[11], user="anne")])
    with pytest.raises(UserError, match="no such file of user embeddings"):
        run_it(recipe, taken, users="nowhere.safetensors")


def test_the_memory_plan_counts_user_layers(recipe):
    from mmalign.training.memory import measured

    counted, kept = measured(mmalign.skeleton(recipe.pretrained_model_name_or_path), recipe, 4, torch.float32)
    network = mmalign.load(recipe.pretrained_model_name_or_path).network
    layers_of.add_layers(network, 3, recipe.user_tokens)
    assert counted == sum(p.numel() for name, p in layers_of.layers(network).items() if ".user." in name)
    assert kept > 0
