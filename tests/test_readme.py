"""Every command of README.md is run. A block or a line that no rule here knows makes the test fail."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from mmalign import cli
from mmalign.data.importers import write_comparisons

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:mmalign|pip|make) .*$", "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.S)), re.M)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
SMALLER = {
    "mmalign quickstart": ["--small"],
    "mmalign train sdxl_diffusion_dpo": [
        *("--max-train-steps", "1", "--resolution", "16", "--rank", "2", "--train-batch-size", "1"),
        *("--gradient-accumulation-steps", "1", "--mixed-precision", "no", "--dataloader-num-workers", "0"),
    ],
    "mmalign score": [],
    "mmalign compare": ["--num-inference-steps", "2", "--limit", "2"],
}
HELPED = {  # run by tests/test_doctor.py, tests/test_status.py and tests/test_demo_page.py
    "mmalign status OUTPUT": "how a run is doing",
    "mmalign doctor": "works together",
    "mmalign votes export": "preference data",
}


def words(line):
    """A command line as the shell would split it, without its comment."""
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sdxl, pairs):
    """A folder in which README's own names exist: my-pairs, pictures/, and what quickstart leaves."""
    folder = tmp_path_factory.mktemp("readme")
    write_comparisons(folder / "my-pairs", pairs[:4])
    (folder / "pictures").mkdir()
    pairs[0].media[0].save(folder / "pictures" / "fox.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in COMMANDS:
            if line.startswith("mmalign "):
                cli.main(_smaller(line, tiny_sdxl))
    return folder


def _smaller(line, model):
    """The line's arguments, made small; a command with no rule is an error."""
    given = words(line)
    rule = next((rule for rule in SMALLER if given[: len(rule.split())] == rule.split()), None)
    assert rule, f"README has a command that tests/test_readme.py cannot run: {line}"
    small = [*given[1:], *SMALLER[rule]]
    if "train" in small:
        small += ["--pretrained-model-name-or-path", str(model), "--pretrained-vae-model-name-or-path", "None"]
    if "--limit" in given:  # ours stands behind it, and the last one counts
        assert small.count("--limit") == 2
    return small


def test_every_block_is_known():
    blocks = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
    assert {language for language, _ in blocks} == {"", "python"}
    lines = [line for language, block in blocks if not language for line in block.splitlines() if line.strip()]
    assert lines == COMMANDS


def test_a_command_without_a_rule_is_an_error():
    with pytest.raises(AssertionError, match="cannot run: mmalign unheard-of"):
        _smaller("mmalign unheard-of", "model")


def test_each_command_leaves_what_readme_says(place, tiny_sdxl):
    assert (place / "quickstart" / "grid.png").is_file()
    assert (place / "pictures" / "scores.csv").is_file()
    assert (place / "compare" / "report.html").is_file()
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    (call,) = [code for code in INLINE if code.startswith("pipeline.")]
    eval(call.replace('"sdxl-dpo"', "folder"), {"pipeline": pipeline, "folder": str(place / "sdxl-dpo")})
    assert pipeline.get_active_adapters()


def test_inline_commands(place, monkeypatch, capsys):
    """The commands inside sentences: each by its own rule."""
    monkeypatch.chdir(place)
    shown = [code for code in INLINE if code.split()[0] in ("mmalign", "make", "pip") and len(code.split()) > 1]
    for code in shown:
        if code.startswith(("make ", "pip ")):
            _installs(code)
        elif code == "mmalign demo":
            _demo(monkeypatch)
        elif code.endswith("--help") or code in HELPED:
            with pytest.raises(SystemExit) as ended:
                cli.main([*words(code)[1:], "--help"])
            assert ended.value.code == 0
            assert HELPED.get(code, "--learning-rate") in capsys.readouterr().out
        elif code == "mmalign recipes copy NAME":
            cli.main(["recipes", "copy", "sdxl_diffusion_dpo"])
            assert (place / "sdxl_diffusion_dpo.py").is_file()
        else:
            pytest.fail(f"README has a command that tests/test_readme.py cannot run: {code}")


def _demo(monkeypatch):
    """`mmalign demo` up to where the page would be served."""
    served = []
    with monkeypatch.context() as patch:
        patch.setattr("runpy.run_path", lambda path: {"launch": lambda **given: served.append(given)})
        cli.main(["demo"])
    assert served[0]["base"] is served[0]["host"] is None


def test_installing_lines():
    for line in COMMANDS:
        if not line.startswith("mmalign "):
            _installs(line)


def _installs(line):
    """Checked without installing: targets by `make -n`, files and extras by their names."""
    given = words(line)
    if given[0] == "make":
        subprocess.run(["make", "-n", *given[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert given[:2] == ["pip", "install"], line
    if "-c" in given:
        assert (ROOT / given[given.index("-c") + 1]).is_file()
    target, extras = re.fullmatch(r"(\.)(?:\[(.+)\])?", given[-1]).groups()
    project = tomllib.loads((ROOT / target / "pyproject.toml").read_text())["project"]
    assert {*(extras or "").split(",")} - {""} <= project["optional-dependencies"].keys()


def test_the_python_block(tiny_sdxl, pairs):
    import mmalign
    from mmalign.surrogate import FreshNoise
    from mmalign.training.step import feedback_of, keys_of
    from mmalign.training.views import WeightViews

    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    modality = mmalign.load(tiny_sdxl, dtype=torch.float64)
    modality.network.add_adapter(_lora(modality), "policy")
    encoded = modality.encode(pairs[:2])
    keys = keys_of(pairs[:2], [0, 0], seed=0)
    probe = FreshNoise()(encoded.x0, encoded.cond, keys, modality.path, None)
    feedback = feedback_of(pairs[:2])
    names = {
        "modality": modality,
        "probe": probe,
        "views": WeightViews(modality),
        "group": feedback.group,
        "score": feedback.score,
    }
    exec(block, names)
    assert names["loss"].item() == pytest.approx(0.6931471805599453, rel=1e-9)
    names["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in modality.network.parameters())


def _lora(modality):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=modality.lora_targets())
