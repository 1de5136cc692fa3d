"""What people install: the wheel's content, and its commands from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


def run(*command, cwd, **options):
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # by way of the source distribution, as an index would do it
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return next(folder.glob("*.whl"))


def committed(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    return set(listed.stdout.split("\n")) - {""}


def test_the_wheel_carries_everything_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.rpartition("/")[2] for name in archive.namelist() if ".dist-info/" in name}
    bundled = {f"mmalign/_bundled/{name}" for name in committed("recipes", "scorers", "demo")}
    assert names >= bundled | committed("mmalign")
    assert all(name.startswith("mmalign/") for name in names)
    assert not [name for name in names if "__pycache__" in name]
    assert {"LICENSE", "entry_points.txt"} <= metadata
    assert wheel.stat().st_size < 40e6


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["with our packages", "empty"])
def test_the_installed_wheel_works_from_an_empty_folder(wheel, tmp_path, environment):
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=empty)
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", venv / "bin" / "python", wheel]
    if environment == "empty":
        run(*install, "-c", ROOT / "constraints.txt", cwd=empty)
    else:
        run(*install, "--no-deps", cwd=empty)
        ours = sysconfig.get_paths()["purelib"]
        site = next(venv.glob("lib/python*/site-packages"))
        (site / "ours.pth").write_text(f"{ours}\n")
    where = run(venv / "bin" / "python", "-c", "import mmalign; print(mmalign.__file__)", cwd=empty)
    assert where.startswith(str(venv))
    assert "sdxl_diffusion_dpo" in run(venv / "bin" / "mmalign", "recipes", cwd=empty)
    run(venv / "bin" / "mmalign", "quickstart", "--small", cwd=empty)
    made = {path.name for path in (empty / "quickstart").iterdir()}
    assert {"report.html", "grid.png"} <= made
