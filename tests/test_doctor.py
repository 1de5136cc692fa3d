"""`mmalign doctor` on machines that are stood in for: small modules in the place of torch and those built for it."""

import subprocess
import sys

import pytest

from mmalign import doctor
from mmalign.cli import main

TORCH = """
__version__ = "2.11.0+cu130"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: {card})
    is_bf16_supported = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "a card")
    mem_get_info = staticmethod(lambda: (2**33, 2**34))
class Tensor:
    def __init__(self, *size, device="cpu"): pass
    def sum(self): return self
    def item(self): return 2
ones = zeros = Tensor
"""
TORCHVISION = "__version__ = '0.26.0+cu130'\nclass ops: nms = staticmethod(lambda *given: None)"
TORCHAUDIO = "__version__ = '2.11.0+cu130'\nclass functional: resample = staticmethod(lambda *given: None)"


@pytest.fixture
def machine(tmp_path, monkeypatch, capsys):
    """Calls the doctor on a machine with these modules; returns its exit code and lines."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_driver", lambda: "")
    monkeypatch.setattr(doctor, "NEEDED", dict.fromkeys(doctor.NEEDED, 0))

    def call(**modules):
        libraries = {"torch": TORCH.format(card=False), "torchvision": TORCHVISION, "torchaudio": TORCHAUDIO, **modules}
        for name, code in libraries.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(code)
        if "xformers" in modules:
            (tmp_path / "xformers" / "ops.py").touch()
        known, stood_in = doctor.installed, {"xformers": "0.0.35"} if "xformers" in modules else {}
        monkeypatch.setattr(doctor, "installed", lambda name: stood_in.get(name) or known(name))
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
        return ended.value.code, capsys.readouterr().out

    return call


def test_a_machine_without_a_card_runs_quickstart(machine):
    code, said = machine()
    assert code == 0, said
    for line in ("torch 2.11.0+cu130 works", "torchvision 0.26.0+cu130 works", "torchaudio 2.11.0+cu130 works"):
        assert f"ok    {line}\n" in said
    assert "note  no usable NVIDIA card" in said
    assert "attention sdpa" in said
    assert "diffusers " in said
    assert "BAD" not in said
    assert said.endswith("mmalign quickstart would work.\n")


def test_a_card_is_told_with_its_memory_and_attention(machine):
    code, said = machine(torch=TORCH.format(card=True), xformers="__version__ = '0.0.35'")
    assert code == 0, said
    assert "ok    a card: 8.0 of 16.0 GiB free, driver unknown, CUDA 13.0, bf16 yes" in said
    assert "attention: UNets xformers; transformers on diffusers' dispatcher sdpa" in said


@pytest.mark.parametrize(
    ("name", "code", "reason", "todo"),
    [
        ("torchaudio", "raise OSError('undefined symbol')", "OSError: undefined symbol", "or pip uninstall torchaudio"),
        ("torchvision", "import os; os.abort()", "ended by signal 6", "that was made for this torch"),
        ("torchvision", TORCHVISION.replace("nms", "no"), "AttributeError", "that was made for this torch"),
        ("xformers", "raise ImportError('libcudart')", "ImportError: libcudart", "or pip uninstall xformers"),
    ],
)
def test_a_broken_library_is_a_finding_and_the_rest_is_told(machine, name, code, reason, todo):
    status, said = machine(**{name: code})
    assert status == 1
    assert f"BAD   {name} " in said
    assert f" is broken: {reason}" in said
    assert todo in said
    assert "ok    torch 2.11.0+cu130 works" in said
    assert "Traceback" not in said
    assert said.endswith("mmalign quickstart would not work: see the 1 marked BAD.\n")


def test_a_broken_torch_breaks_all_that_are_built_for_it(machine):
    status, said = machine(torch="raise OSError('libc10.so')")
    assert status == 1
    assert f"BAD   torch {doctor.installed('torch')} is broken: OSError: libc10.so" in said
    assert "install a torch that was made for this Python, card and driver" in said
    assert "see the 3 marked BAD" in said


def test_another_build_that_works_is_a_note(machine, tmp_path):
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "cpp_lib.json").write_text('{"version": {"torch": "2.10.0+cu128"}}')
    code, said = machine(
        torchaudio=TORCHAUDIO.replace("cu130", "cu128"),
        xformers=f"__version__ = '0.0.35'; __file__ = {str(tmp_path / 'built' / '__init__.py')!r}",
    )
    assert code == 0, said
    assert "note  torchaudio 2.11.0+cu128 works, but was built for cu128, not torch 2.11.0+cu130" in said
    assert "note  xformers 0.0.35 works, but was built for torch 2.10.0+cu128, not torch 2.11.0+cu130" in said


@pytest.mark.parametrize(
    ("torch", "line"),
    [
        (TORCH.format(card=False), "a card with driver 470.1 that torch, built for CUDA 13.0, cannot use"),
        (TORCH.format(card=False).replace('"13.0"', "None"), "a card with driver 470.1, and a torch without CUDA"),
    ],
)
def test_a_card_that_torch_cannot_use(machine, monkeypatch, torch, line):
    monkeypatch.setattr(doctor, "_driver", lambda: "470.1")
    code, said = machine(torch=torch)
    assert code == 0
    assert f"note  {line}\n      -> " in said


def test_versions_and_room(machine, monkeypatch):
    known = doctor.metadata.version
    versions = {"diffusers": "0.30.0", "gradio": "3.0"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: versions.get(name) or known(name))
    monkeypatch.setattr(doctor, "NEEDED", {"disk here": 2**60, "memory": 2**60})
    status, said = machine()
    assert status == 1
    assert "BAD   diffusers>=0.42 is needed, and 0.30.0 is installed\n      -> pip install 'diffusers>=0.42'" in said
    assert "note  gradio>=6.31 is needed, and 3.0 is installed" in said
    assert "GiB of disk here free\n      -> quickstart takes up to" in said
    assert "see the 3 marked BAD" in said


def test_nothing_heavy_is_imported():
    code = "import sys; from mmalign import doctor; doctor.USES = {}; doctor.main(); print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert not {"torch", "diffusers", "transformers", "numpy", "xformers", "torchaudio"} & set(loaded)


@pytest.mark.slow
def test_this_machine(capsys):
    assert doctor.main() == 0, capsys.readouterr().out
