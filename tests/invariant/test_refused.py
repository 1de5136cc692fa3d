"""Feedback that a method cannot learn from: one sentence, exit code 2, nothing written."""

import json

import pytest

from mmalign.cli import main
from mmalign.data.importers import write_comparisons
from mmalign.records import Comparison
from tests.conftest import picture
from tests.test_cli import RECIPE, refused


@pytest.fixture
def train(tmp_path, tiny_sdxl, capsys):
    """Trains on rows of scores; returns the command's one sentence."""

    def run(scores, *flags, model=tiny_sdxl, **more):
        rows = [
            Comparison(id=f"row-{i}", prompt="red", media=[picture(10 * i + k) for k in range(len(s))], score=s, **more)
            for i, s in enumerate(scores)
        ]
        write_comparisons(tmp_path / "data", rows)
        file = tmp_path / "mine.py"
        file.write_text(RECIPE.format(model=str(model), data=str(tmp_path / "data"), output=str(tmp_path / "run")))
        said = refused(capsys, "train", file, *flags)
        assert not (tmp_path / "run").exists()
        return said

    return run


LABELS, SCORES = [(1.0, 0.0)] * 4, [(0.7, 0.2), (0.1, 0.4), (0.9, 0.3), (0.5, 0.6)]


@pytest.mark.parametrize("method", ["SmPO", "RankDPO", "MMDPO"])
def test_labels_where_scores_are_needed(train, method):
    said = train(LABELS, "--objective", method, "--objective.beta", "100")
    assert f"{method} cannot be trained" in said
    assert "score the data first" in said
    scaled = train(LABELS, "--objective", method, "--objective.beta", "100", "--score-scale", "0.1", "0.3")
    assert "score_scale is set, but the scores are labels" in scaled


def test_gains_outside_their_range_and_lists_of_one(train):
    wide = [(7.0, 2.0), (1.0, 4.0), (9.0, 3.0), (5.0, 6.0)]
    assert "[0, 1]" in train(wide, "--objective", "RankDPO", "--objective.beta", "100")
    lonely = [(0.7,), (0.3, 0.5), (0.2, 0.4)]
    said = train(lonely, "--objective", "RankDPO", "--objective.beta", "100", "--train-batch-size", "3")
    assert "a list has one sample" in said


def test_pairs_without_users(train):
    assert "user" in train(SCORES, "--objective", "PPD", "--objective.beta", "100")


def test_scores_that_are_no_numbers(train, tmp_path, capsys):
    train(LABELS, "--objective", "SmPO", "--objective.beta", "100")  # writes the data and the recipe
    file = tmp_path / "data" / "comparisons.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["score"] = [float("nan"), 0.5]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    said = refused(capsys, "train", tmp_path / "mine.py")
    assert "score" in said
    assert "finite" in said


def test_a_method_without_its_beta(train):
    assert "beta" in train(SCORES, "--objective", "InPO")


def test_every_method_trains_by_one_flag(tmp_path, tiny_sdxl, capsys):
    rows = [
        Comparison(id=f"row-{i}", prompt="red", media=[picture(2 * i), picture(2 * i + 1)], score=s)
        for i, s in enumerate(SCORES)
    ]
    write_comparisons(tmp_path / "data", rows)
    file = tmp_path / "mine.py"
    for method in ("MaPO", "InPO", "SmPO", "RankDPO", "MMDPO"):
        output = str(tmp_path / method)
        file.write_text(RECIPE.format(model=str(tiny_sdxl), data=str(tmp_path / "data"), output=output))
        beta = [] if method == "MaPO" else ["--objective.beta", "100"]
        main(["train", str(file), "--objective", method, *beta, "--max-train-steps", "1"])
        recipe = json.loads((tmp_path / method / "recipe.json").read_text())
        assert recipe["objective"]["name"] == method
        inverted = {"InPO": "DDIMInversion", "SmPO": "ReNoise"}.get(method)
        assert inverted is None or inverted in recipe["objective"]["draw"]
