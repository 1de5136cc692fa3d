"""The walkthroughs of CONTRIBUTING.md are run."""

import re
import textwrap
from pathlib import Path

from mmalign.scoring.scorer import Card

GUIDE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", GUIDE, flags=re.S | re.M)
    return [textwrap.dedent(block) for _, block in found]


def test_the_objective_and_its_test_run():
    names = {"__name__": "guide"}
    for block in blocks("python"):
        exec(block, names)
    names["test_without_flips_it_is_dpo"]()


def test_the_card_is_a_card(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "card.yaml").write_text(block)
    assert Card.read(tmp_path).name == "my-clip"


def test_the_commands_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)  ", GUIDE)):
        assert f"\n{target}:" in makefile
