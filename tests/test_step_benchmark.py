"""The step benchmark on its tiny preset: our step and the published structures do the same."""

from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow  # a dozen trainings


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import step as module

        folder = tmp_path_factory.mktemp("tiny")
        module.build("tiny", folder)
        yield SimpleNamespace(module=module, folder=folder)


@pytest.fixture(scope="module")
def found(step):
    names = [name for name in step.module.NAMES if "sweep" not in name]
    return {name: [step.module.measured("tiny", step.folder, name)] for name in names}


def test_the_published_steps_and_ours_have_the_same_losses(step, found):
    line = step.module.same_losses(found)
    assert "LoRA" in line
    assert "whole network" in line
    assert all(one["losses"][-1] != one["losses"][0] for several in found.values() for one in several)


def test_other_losses_are_no_comparison(step, found):
    name = "LoRA: ours, live"
    wrong = {**found[name][0], "losses": [loss + 1e-4 for loss in found[name][0]["losses"]]}
    with pytest.raises(SystemExit, match="LoRA: the first losses differ"):
        step.module.same_losses(found | {name: [wrong]})


def test_the_page_has_a_row_a_case_and_the_counted_ratio(step, found, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["step.py"])
    found = {name: [{**one, "gib": 2.0, "empty": 0.5} for one in several] for name, several in found.items()}
    found["whole network: ours, small"][0]["gib"] = 1.25
    (first,) = found["LoRA: ours, reference cached too"]
    other = {**first, "losses": [loss + 0.25 for loss in first["losses"]]}
    found |= {"sweep (LoRA, all cached): as above": [first], "sweep (LoRA, all cached): bfloat16": [other]}
    counted = {name: parts for name, parts in step.module.counts("tiny", step.folder).items() if name in found}
    scaled = {"members": {"2": 10, "4": 20}, "side": {"512": 10, "1024": 44}}
    arguments = SimpleNamespace(device="cpu", preset="tiny", output=tmp_path / "page.md")
    page = step.module.report(arguments, found, counted, scaled)
    for name in found:
        assert f"| {name.replace(': ', ' | ')} |" in page
    assert "| 1024 | 0.0 | 4.40 | 4.00 |" in page
    assert "peak memory at most 0.50 of the Salesforce script's: 0.50 above, 0.62 with the empty process" in page
    assert f"Losses of {len(first['losses'])} steps of the sweep" in page
    assert "at most: bfloat16 0.2" in page
    assert (tmp_path / "page.png").is_file()
    rows = step.module.compared(found, counted, "cpu_seconds")
    whole = counted["LoRA: diffusers' script"]
    cached = whole["policy forward"] + whole["backward"]
    assert rows["LoRA: ours, reference cached too"]["counted"] == pytest.approx(sum(whole.values()) / cached)
    assert rows["whole network: Salesforce's script"]["counted"] == 1
