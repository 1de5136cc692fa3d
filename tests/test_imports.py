"""Every module imports, with and without each optional package; and the light entry points stay light."""

import pkgutil
import subprocess
import sys

import pytest

import mmalign

OPTIONAL = ["xformers", "torchaudio", "torchvision", "gradio", "ray", "bitsandbytes"]
HEAVY = ["torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip", "matplotlib"]

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mmalign.__path__, "mmalign.")
    if module.name.rpartition(".")[2] != "__main__"
)

HIDE_AND_IMPORT = """
import importlib, importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def python(*arguments):
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param("", id="nothing hidden"),
        pytest.param(" ".join(OPTIONAL), id="all hidden"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONAL),
    ],
)
def test_every_module_imports(hidden):
    assert "mmalign.surrogate.likelihood" in MODULES
    python("-c", HIDE_AND_IMPORT, hidden, *MODULES)


@pytest.mark.parametrize("command", ["import mmalign", "import mmalign.records, mmalign.storage"])
def test_light_imports_stay_light(command):
    loaded = python("-c", f"{command}; import sys; print(*sys.modules)").split()
    assert "mmalign" in loaded
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"]], ids=" ".join)
def test_light_commands_stay_light(arguments):
    code = f"""
import contextlib, sys
from mmalign.cli import main
sys.argv = ["mmalign", *{arguments}]
with contextlib.suppress(SystemExit):
    main()
print("loaded:", *sys.modules)
"""
    loaded = python("-c", code).rpartition("loaded:")[2].split()
    assert not {*HEAVY, "numpy"} & set(loaded)
