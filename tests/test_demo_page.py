"""docs/demo.md: every command, up to where a page would be served."""

import re
import shlex
from pathlib import Path

import pytest

from mmalign import cli
from mmalign.data.candidates import encoded
from mmalign.evaluation.votes import Votes
from tests.conftest import picture

PAGE = (Path(__file__).parent.parent / "docs" / "demo.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]


@pytest.fixture
def voted(tmp_path, monkeypatch):
    """A vote in the folder that the demo has by default."""
    monkeypatch.chdir(tmp_path)
    votes = Votes("mmalign-demo")
    files = {model: votes.keep(encoded(picture(number)), "png") for number, model in enumerate(("base", "aligned"))}
    votes.add("a red fox", {"seed": 0}, files)
    votes.vote(votes.issue("somebody", ["base", "aligned"]).token, "1")


def test_the_commands(voted, tmp_path, monkeypatch):
    served = []
    small = ["--max-train-steps", "1", "--train-batch-size", "1"]
    for line in COMMANDS:
        program, *given = shlex.split(line, comments=True)
        if given[0] == "demo":
            with monkeypatch.context() as patch:
                patch.setattr("runpy.run_path", lambda path: {"launch": lambda **asked: served.append(asked)})
                cli.main(given)
        elif program == "mmalign":
            cli.main([*given, *(small if given[0] == "train" else [])])
        else:
            assert given == ["install", "mmalign[demo]"]
    assert [(one["loras"], one["models"]) for one in served] == [
        ((), ()),
        (("quickstart/aligned",), ()),
        (("A", "B"), ("other=PATH",)),
    ]
    assert (tmp_path / "voted" / "pytorch_lora_weights.safetensors").is_file()
