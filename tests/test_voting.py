"""`mmalign votes`, from the demo's folder to a trained model."""

import pytest

from mmalign.cli import main
from mmalign.data.candidates import encoded
from mmalign.data.importers import read_comparisons
from mmalign.evaluation.votes import Votes
from mmalign.records import Sound, Text
from tests.conftest import picture
from tests.test_cli import refused

RECIPE = """
from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run

def recipe():
    return Run(
        pretrained_model_name_or_path={model!r}, dataset_name={data!r}, output_dir={output!r},
        objective=DiffusionDPO(beta=2000), max_train_steps=2, learning_rate=1e-2, train_batch_size=2,
    )
"""


@pytest.fixture
def voted(tmp_path):
    """Five pairs, of which one a tie, one both bad, one damaged; and a ranked list."""
    votes, number = Votes(tmp_path / "demo"), 0
    for item, choice in enumerate(["1", "2", "0", "x", "1", "3142"]):
        models = "abcd"[: 4 if len(choice) > 1 else 2]
        pictures = [encoded(picture(number + n)) for n in range(len(models))]
        number += len(models)
        files = {model: votes.keep(content, "png") for model, content in zip(models, pictures, strict=True)}
        votes.add("a red fox", {"seed": item}, files, owner=f"voter{item}")
        ballot = votes.issue(f"voter{item}", list(models), len(models), prompt="a red fox")
        votes.vote(ballot.token, choice)
        if item == 4:
            (votes.media / ballot.files[0]).write_bytes(b"damaged")
            (votes.media / ballot.files[1]).unlink()
    return votes


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_votes_become_comparisons(voted, tmp_path, capsys, layout):
    main(["votes", "export", str(voted.folder), "--output", str(tmp_path / "out"), "--layout", layout])
    said = capsys.readouterr().out
    assert "3 of 6 votes" in said
    assert "1 both bad, 1 ties, 1 with a medium that is missing or damaged" in said
    assert all(str(voted.media / file) in said for file in voted.all()[4].files)
    found = read_comparisons(tmp_path / "out").comparisons
    cast = [vote for number, vote in enumerate(voted.all()) if number in (0, 1, 5)]
    assert [item.user for item in found] == ["voter0", "voter1", "voter5"]
    assert [item.score for item in found] == [(1, 0), (0, 1), pytest.approx((2 / 3, 0, 1, 1 / 3))]
    assert [item.source for item in found] == [vote.models for vote in cast]
    assert len({item.id for item in found}) == 3
    assert [encoded(item.media[0]) for item in found] == [(voted.media / vote.files[0]).read_bytes() for vote in cast]


def test_an_export_trains_at_once(voted, tiny_sdxl, tmp_path, capsys):
    main(["votes", "export", str(voted.folder), "--output", str(tmp_path / "out")])
    places = {"model": str(tiny_sdxl), "data": str(tmp_path / "out"), "output": str(tmp_path / "run")}
    (tmp_path / "mine.py").write_text(RECIPE.format(**places))
    main(["train", str(tmp_path / "mine.py")])
    assert "step 2/2" in capsys.readouterr().out
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_outliers_can_be_left_out(tmp_path, capsys):
    votes = Votes(tmp_path / "demo")
    for item in range(40):
        pictures = {model: encoded(picture(2 * item + n)) for n, model in enumerate("ab")}
        votes.add("fox", {"seed": item}, {model: votes.keep(content, "png") for model, content in pictures.items()})
    for voter in ("one", "two", "three", "contrary"):
        for _ in range(40):
            ballot = votes.issue(voter, ["a", "b"], seed=0)
            best = ballot.models.index("b" if voter == "contrary" else "a")
            votes.vote(ballot.token, str(best + 1))
    main(["votes", "export", str(votes.folder), "--output", str(tmp_path / "out"), "--outliers", "drop"])
    assert "120 of 160 votes" in (said := capsys.readouterr().out)
    assert "40 of outliers" in said
    assert {item.user for item in read_comparisons(tmp_path / "out").comparisons} == {"one", "two", "three"}


def test_sounds_and_answers_with_their_pictures(tmp_path):
    votes = Votes(tmp_path / "demo")
    shown = votes.keep(encoded(picture(9)), "png")
    kinds = {"flac": {}, "txt": {"images": [shown]}}
    for ending, more in kinds.items():
        files = {model: votes.keep(f"{ending}{model}".encode(), ending) for model in "ab"}
        votes.add(ending, more, files, owner=ending)
        votes.vote(votes.issue(ending, ["a", "b"], prompt=ending, seed=0).token, "1")
    main(["votes", "export", str(votes.folder), "--output", str(tmp_path / "out"), "--layout", "jsonl"])
    sound, answer = read_comparisons(tmp_path / "out").comparisons
    assert all(isinstance(one, Sound) for one in sound.media)
    assert {Text("txta"), Text("txtb")} == set(answer.media)
    assert encoded(answer.condition[0]) == (votes.media / shown).read_bytes()


def test_a_folder_without_votes_is_said(tmp_path, capsys):
    assert "holds no votes.sqlite" in refused(capsys, "votes", "export", tmp_path)
    assert not list(tmp_path.iterdir())
    Votes(tmp_path)
    assert "vote first" in refused(capsys, "votes", "export", tmp_path, "--output", tmp_path / "out")
    assert "mmalign votes export" in refused(capsys, "votes")
