import json
import os

import pytest

from mmalign.records import UserError
from mmalign.training.outputs import list_outputs, read_output, read_validation
from tests.conftest import picture


@pytest.fixture
def root(tmp_path):
    """Two runs, the second in a folder of its own; `dpo` has validations."""
    for number, name in enumerate(("dpo", "sweep/one")):
        folder = tmp_path / "runs" / name
        (folder / "validation").mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps({"objective": {"name": "DPO"}, "seed": number}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 0.5}) + "\n" for n in (1, 2)))
        os.utime(folder / "metrics.jsonl", (number, number))
    validation = tmp_path / "runs/dpo/validation"
    for step in (20, 3):
        picture(step).save(validation / f"step-{step:06d}.png")
    (validation / "step-000030.json").write_text(json.dumps({"prompt": ["p"], "base": ["b"], "policy": ["<b>x"]}))
    (validation / "notes.txt").write_text("mine")
    return tmp_path / "runs"


def test_runs_are_listed_the_newest_first_and_read(root):
    (root / "data").mkdir()
    assert list_outputs(root) == ["sweep/one", "dpo"]
    output = read_output(root / "dpo")
    assert output.recipe["seed"] == 0
    assert [row["step"] for row in output.rows] == [1, 2]
    assert list(output.validation) == [3, 20, 30]
    assert read_validation(output.validation[20]).size == picture(20).size
    assert read_validation(output.validation[30]) == [["p", "b", "<b>x"]]


def test_of_a_run_under_way_whole_lines_count(root):
    with (root / "dpo/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in read_output(root / "dpo").rows] == [1, 2]


def test_links_lead_nowhere(root, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/metrics.jsonl").write_text('{"step": 1}')
    (root / "out").symlink_to(tmp_path / "secret")
    assert "out" not in list_outputs(root)
    (root / "dpo/recipe.json").unlink()
    (root / "dpo/recipe.json").symlink_to(root / "sweep/one/recipe.json")
    with pytest.raises(UserError, match="leads out"):
        read_output(root / "dpo")
    validation = read_output(root / "sweep/one").folder / "validation/step-000001.png"
    validation.symlink_to(root / "dpo/validation/step-000003.png")
    with pytest.raises(UserError, match="leads out"):
        read_validation(validation)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.json", None),
        ("recipe.json", "{"),
        ("recipe.json", "{}"),
        ("recipe.json", "[]"),
        ("recipe.json", '{"objective": 1}'),
        ("metrics.jsonl", '{"ste\n{"step": 1}\n'),
        ("metrics.jsonl", "1\n"),
        ("metrics.jsonl", '{"step": "one"}\n'),
    ],
)
def test_damaged_and_foreign_folders_are_one_sentence(root, name, content):
    (root / "dpo" / name).unlink()
    if content is not None:
        (root / "dpo" / name).write_text(content)
    with pytest.raises(UserError, match=r"^dpo: is .* mmalign train"):
        read_output(root / "dpo")


def test_a_damaged_validation_is_one_sentence(root):
    validation = read_output(root / "dpo").validation
    validation[3].write_bytes(b"no picture")
    validation[30].write_text('{"prompt": ["p"], "base": [], "policy": ["x"]}')
    with pytest.raises(UserError, match="cannot be decoded"):
        read_validation(validation[3])
    with pytest.raises(UserError, match="is damaged"):
        read_validation(validation[30])
