"""Uploading: asked for before training, done after it, and a failure loses nothing. The hub is a double."""

import pytest

from mmalign.cli import main
from mmalign.data.importers import write_comparisons
from tests.test_cli import RECIPE


class Hub:
    """HfApi as far as it is used; `refuses` and `drops` make the two calls fail."""

    refuses = drops = None

    def __init__(self):
        self.calls = Hub.calls

    def create_repo(self, name, exist_ok):
        assert exist_ok
        if Hub.refuses:
            raise Hub.refuses
        self.calls.append(("create", name))
        return type("Url", (), {"repo_id": f"somebody/{name}"})

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        if Hub.drops:
            raise Hub.drops
        from huggingface_hub.utils import filter_repo_objects

        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        kept = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        self.calls.append(("upload", repo_id, folder_path, kept))


@pytest.fixture
def command(tmp_path, tiny_sdxl, pairs, monkeypatch):
    """A `train` command line with an upload at its end."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    write_comparisons(tmp_path / "data", pairs[:4])
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.format(model=str(tiny_sdxl), data=str(tmp_path / "data"), output=str(tmp_path / "run")))
    return ["train", str(file), "--push-to-hub", "--max-train-steps", "1", "--train-batch-size", "1"]


def ended(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mmalign: ")
    return stopped.value.code, said


def test_the_folder_goes_up_without_checkpoints(command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial-1-x").write_text("half-written by somebody else")
    main(command)
    (_, made), (_, repository, folder, files) = Hub.calls
    assert made == "run"  # the output folder's name
    assert repository == "somebody/run"
    assert folder == tmp_path / "run"
    assert (folder / "checkpoint-1").is_dir()
    assert sorted(files) == [
        "README.md",
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
        "recipe.json",
    ]
    assert "Uploaded to somebody/run." in capsys.readouterr().out


def test_another_name(command):
    main([*command, "--hub-model-id", "mine"])
    assert [call[1] for call in Hub.calls] == ["mine", "somebody/mine"]


def test_a_failed_upload_loses_nothing(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Hub, "drops", ConnectionError("the line went dead\nand a long trace"))
    code, said = ended(command, capsys)
    assert code == 1
    assert "the line went dead" in said
    assert "hf upload somebody/run" in said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"README.md", "checkpoint-1", "pytorch_lora_weights.safetensors", "metrics.jsonl"}


def test_a_missing_token_is_said_before_training(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Hub, "refuses", OSError("401 Unauthorized"))
    code, said = ended(command, capsys)
    assert code == 2
    assert "401 Unauthorized" in said
    assert "hf auth login" in said
    assert not (tmp_path / "run").exists()


def test_without_the_flag_the_hub_is_not_asked(command):
    main([word for word in command if word != "--push-to-hub"])
    assert Hub.calls == []
