"""`mmalign status`: from files alone, while a run works, after it ended, after it died."""

import json

import pytest

from mmalign import storage
from mmalign.cli import main
from tests.test_cli import recipe, refused  # noqa: F401 a fixture


@pytest.fixture
def told(capsys):
    """What the command says of a folder, by its titles."""

    def status(folder):
        capsys.readouterr()
        main(["status", str(folder)])
        return {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}

    return status


def test_a_run_while_it_works_and_after(recipe, tmp_path, told, monkeypatch):  # noqa: F811
    from mmalign.training import loop

    real, during = loop.Log.write, []

    def write(self, step, metrics):
        real(self, step, metrics | {"skipped_steps": 1.0})
        during.append(told(tmp_path / "run"))

    monkeypatch.setattr(loop.Log, "write", write)
    main(["train", str(recipe), "--max-train-steps", "3", "--checkpointing-steps", "2"])
    first, _, third = during
    assert first["step"].startswith("1 of 3, ")
    assert (first["last checkpoint"], third["last checkpoint"]) == ("none", "checkpoint-2")
    assert (third["skipped steps"], third["rows"]) == ("1", "12 comparisons")
    after = told(tmp_path / "run")
    assert after["last checkpoint"] == "checkpoint-3"
    assert after["run"].startswith("DiffusionDPO of ")
    assert after["time left"] == "0 s"


def test_the_rate_is_the_median_of_the_last_steps(tmp_path, told):
    about = {"pretrained_model_name_or_path": "m", "objective": {"name": "SFT"}, "max_train_steps": 1000}
    storage.write_json(tmp_path / "recipe.json", about | {"data": {"read": 3000, "cached": 2950, "missing_file": 50}})
    row = {"samples_per_second": 8.0, "skipped_steps": 2.0}
    rows = [row | {"step": n, "seconds": 600 if n in (1, 90) else 30} for n in range(1, 101)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 101, "sec')  # it is being written
    found = told(tmp_path)
    assert found["step"].startswith("100 of 1000, ")
    assert found["rate"] == "30 s a step, 8 samples a second"
    assert found["time left"] == "7 h 30 min"
    assert found["rows"] == "3,000 read, 2,950 cached, 50 missing_file"
    assert found["skipped steps"] == "2"
    (tmp_path / "metrics.jsonl").write_text("")
    assert told(tmp_path)["step"] == "0 of 1000"


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    assert "output folder" in refused(capsys, "status", tmp_path / "nothing")
    assert "output folder" in refused(capsys, "status", tmp_path)
    storage.write_json(tmp_path / "recipe.json", {"objective": {}})
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    assert "output folder" in refused(capsys, "status", tmp_path)
