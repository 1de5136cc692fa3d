"""`mmalign user`, and pictures for a user, as a user meets them."""

from dataclasses import replace

import pytest
import torch

from mmalign.cli import main
from mmalign.data.importers import write_comparisons
from mmalign.data.users import Users, read_users, write_users
from tests.test_cli import refused
from tests.tiny import tiny_vlm

RECIPE = """
from mmalign.objectives import PPD
from mmalign.training.run import Run

def recipe():
    return Run(
        pretrained_model_name_or_path={model!r}, dataset_name={data!r}, output_dir={output!r}, users={users!r},
        objective=PPD(beta=2000), max_train_steps=2, learning_rate=1e-2, train_batch_size=2,
        validation_prompts=("a red fox",),
    )
"""


@pytest.fixture
def data(tmp_path, pairs):
    """Eight pairs of ann, four of bob; and a folder where nobody is named."""
    named = [replace(pair, user="bob" if i % 3 == 0 else "ann") for i, pair in enumerate(pairs)]
    write_comparisons(tmp_path / "data", named)
    write_comparisons(tmp_path / "nobody", pairs)
    return tmp_path / "data"


def make(data, output, *more):
    main(["user", "make", "--pairs", str(data), "--output", str(output), *more])


def test_make_blend_train_and_compare_for_a_user(data, tmp_path, tiny_sdxl, capsys):
    users = tmp_path / "users.safetensors"
    make(data, users)
    assert "2 users embedded from 4 pairs each, 0 with fewer left out" in capsys.readouterr().out
    main(["user", "blend", "ann", "bob", "--weight", "0.25", "--users", str(users)])
    known = read_users(users)
    assert set(known.vectors) == {"ann", "bob", "ann+bob@0.25"}
    torch.testing.assert_close(known["ann+bob@0.25"], 0.75 * known["ann"] + 0.25 * known["bob"])
    assert known.facts["encoder"] == "embedded-clip"

    recipe, run = tmp_path / "mine.py", tmp_path / "run"
    places = {"model": str(tiny_sdxl), "data": str(data), "output": str(run), "users": str(users)}
    recipe.write_text(RECIPE.format(**places))
    main(["train", str(recipe)])
    assert {"user_layers.safetensors", "users.safetensors", "validation"} <= {path.name for path in run.iterdir()}
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    ask = ["compare", tiny_sdxl, run, "--prompts", tmp_path / "prompts.txt", "--num-inference-steps", "1"]
    ask += ["--scorer", "embedded-clip", "--output-dir", tmp_path / "report"]
    main([str(word) for word in [*ask, "--user", "ann+bob@0.25"]])
    assert "win rate" in capsys.readouterr().out
    assert "ann+bob@0.25" in (tmp_path / "report" / "report.html").read_text()
    assert "say whose pictures by --user" in refused(capsys, *ask)
    assert "did you mean 'ann'?" in refused(capsys, *ask, "--user", "anna")
    ask[2] = tmp_path / "nobody"
    assert "has no user layers" in refused(capsys, *ask, "--user", "ann")


def test_one_new_user_joins_the_file(data, tmp_path, capsys):
    users = tmp_path / "users.safetensors"
    make(data, users, "--user", "bob")
    assert set(read_users(users).vectors) == {"bob"}
    make(data, users, "--user", "ann")
    whole = read_users(users)
    assert set(whole.vectors) == {"ann", "bob"}
    make(data, tmp_path / "again.safetensors")
    again = read_users(tmp_path / "again.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in again.vectors)
    make(data, tmp_path / "eight.safetensors", "--count", "8")
    assert set(read_users(tmp_path / "eight.safetensors").vectors) == {"ann"}
    assert "1 with fewer left out" in capsys.readouterr().out


def test_a_vision_language_model_looks_at_the_pairs(data, tmp_path, capsys):
    model = tiny_vlm(tmp_path / "vlm")
    make(data, tmp_path / "users.safetensors", "--encoder", str(model), "--layer", "1", "--pooling", "last")
    known = read_users(tmp_path / "users.safetensors")
    assert known.facts["layer"] == 1
    assert known.features == 16
    said = refused(capsys, "user", "make", "--pairs", data, "--output", tmp_path / "users.safetensors")
    assert "was made another way" in said


def test_bad_input_is_one_sentence_and_writes_nothing(data, tmp_path, capsys):
    ask = ["user", "make", "--pairs", data, "--output", tmp_path / "users.safetensors"]
    assert "user 'carol' has 0 pairs, and 4 are needed" in refused(capsys, *ask, "--user", "carol")
    assert "no user has 9 pairs" in refused(capsys, *ask, "--count", "9")
    assert "count is 0" in refused(capsys, *ask, "--count", "0")
    assert "is no vision-language model" in refused(capsys, *ask, "--encoder", tmp_path)
    assert "no layer 'act9'" in refused(capsys, *ask, "--layers", "act9")
    assert "no such file or folder" in refused(capsys, "user", "make", "--pairs", tmp_path / "nothing")
    assert "names a user" in refused(capsys, "user", "make", "--pairs", tmp_path / "nobody")
    assert "did you mean --output?" in refused(capsys, *ask, "--outpt", "x")
    assert "mmalign user make" in refused(capsys, "user")
    assert not (tmp_path / "users.safetensors").exists()

    users = tmp_path / "two.safetensors"
    assert "no such file" in refused(capsys, "user", "blend", "a", "b", "--users", users)
    write_users(users, Users({"a": torch.ones(2), "b": -torch.ones(2)}, {}))
    assert "no embedding of user 'c'" in refused(capsys, "user", "blend", "a", "c", "--users", users)
    assert "is one of the two" in refused(capsys, "user", "blend", "a", "b", "--users", users, "--name", "a")
    users.write_bytes(b"nothing of the kind")
    assert "is no file of user embeddings" in refused(capsys, "user", "blend", "a", "b", "--users", users)
