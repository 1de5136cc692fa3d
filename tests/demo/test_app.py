import runpy
import subprocess
import sys
from importlib.metadata import version

import app
import pytest
import yaml
from packaging.requirements import Requirement

import mmalign
from mmalign.records import UserError


def test_the_page_has_its_tabs_in_order(studio):
    page = app.build(studio)
    labels = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
    assert labels == ["Compare", "Arena", "Score", "Personalise", "Runs"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "my-machine"])
def test_another_address_needs_a_password(host):
    with pytest.raises(UserError, match="--auth"):
        app.launch(host=host)


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_half_a_password_is_refused(auth):
    with pytest.raises(UserError, match="USER:PASSWORD"):
        app.launch(host="0.0.0.0", auth=auth)


def test_the_space_finds_what_it_needs():
    folder = mmalign.bundled("demo")
    header = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio"
    assert (folder / header["app_file"]).is_file()
    assert header["sdk_version"] == version("gradio")
    assert len(header["short_description"]) <= 60
    (line,) = (folder / "requirements.txt").read_text().splitlines()
    needed = Requirement(line)
    assert (needed.name, needed.extras) == ("mmalign", {"demo"})
    assert mmalign.__version__ in needed.specifier


def test_a_space_has_its_flags_in_a_variable(monkeypatch, capsys):
    monkeypatch.setenv("MMALIGN_DEMO", "--model 'my model'")
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(app.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert "--model my model: write NAME=SOURCE" in capsys.readouterr().err


def test_a_space_listens_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("SPACE_ID", "me/mmalign")
    told = {}
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda self, **options: told.update(options))
    app.launch(data_dir=tmp_path)
    assert told["server_name"] is None  # Gradio takes it from the Space


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False)]
)
def test_what_is_local(host, local):
    assert app.is_local(host) == local


def test_the_page_stands_before_torch_is_loaded(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(mmalign.bundled("demo"))!r})
import app
app.build(app.Studio(loras=["one=x"], data_dir={str(tmp_path)!r}))
print("torch" in sys.modules, "diffusers" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "False False\n", ended.stderr
