"""docs/data.md: its six commands, one after the other, at a small size."""

import re
import shlex
from pathlib import Path

import pytest

from mmalign import cli

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
SMALLER = {"--limit": "4", "--num": "3"}
MORE = {
    "generate": ["--num-inference-steps", "2"],
    "train": ["--max-train-steps", "2", "--train-batch-size", "2"],
    "compare": ["--num-inference-steps", "2"],
}


def commands():
    (block,) = re.findall(r"```\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines():
        program, command, *rest = shlex.split(line)
        assert program == "mmalign"
        given = [SMALLER.get(before, word) for before, word in zip([command, *rest], rest, strict=False)]
        yield command, [command, *given, *MORE.get(command, [])]


def test_the_loop_runs_by_commands_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    for command, words in commands():
        cli.main(words)
        ran.append(command)
        if command == "cache":
            assert "4 read, 4 cached" in capsys.readouterr().out
    assert ran == ["generate", "score", "pairs", "cache", "train", "compare"]
    for left in ("candidates/scores.parquet", "lists/README.md", "aligned/pytorch_lora_weights.safetensors"):
        assert (tmp_path / left).is_file()
    assert (tmp_path / "report" / "report.html").is_file()


def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, part in [
        (["cache"], "needs a recipe"),
        (["cache", "embedded_rankdpo", "--dataset-name", "gone"], "gone"),
        (["cache", "embedded_rankdpo", "--dataset-nme", "x"], "did you mean --dataset-name"),
        (["cache", "embedded_inpo", "--dataset-name", "x", "--cache-dir", "c", "--draws-per-sample", "2",
          "--cache-reference"], "changes as it learns"),
        (["pairs", "gone"], "gone"),
        (["score", "gone"], "gone"),
        (["generate", "embedded", "--prompts", "gone.txt"], "gone.txt"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert part in error
        assert "Traceback" not in error
