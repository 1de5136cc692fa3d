"""`mmalign doctor`: what is installed, whether it works together, and what to do where it does not.

Each binary library is imported and used in a process of its own, all at once: one that is broken, even one that takes
the interpreter down with it, is a finding like others, and this process imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mmalign.embedded import path as embedded_path

GIB = 2**30
# Library -> a use that fails where it does not fit the torch that is there
USES = {
    "torch": "card = torch.cuda.is_available() and torch.ones(2, device='cuda').sum().item() == 2",
    "torchvision": "torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)",
    "torchaudio": "torchaudio.functional.resample(torch.zeros(1, 8), 2, 1)",
    "xformers": "import xformers.ops; built = os.path.join(os.path.dirname(xformers.__file__), 'cpp_lib.json')",
}
FACTS = {
    "torch": """{"cuda": torch.version.cuda, "bf16": bool(card) and torch.cuda.is_bf16_supported(),
        "card": torch.cuda.get_device_name() if card else None, "free": torch.cuda.mem_get_info() if card else None}""",
    "xformers": "{'built': json.load(open(built))['version']['torch']} if os.path.exists(built) else {}",
}

# Of quickstart, with room: --small took 1.2 GiB of memory and 15 MB (CPU, torch 2.11); the whole makes larger batches
NEEDED = {"disk here": GIB // 2, "memory": 2 * GIB}

Finding = tuple[str, str, str]  # ok, note (quickstart works all the same) or BAD (it does not); what; what to do


def main() -> int:
    """Prints every finding; 0 when `mmalign quickstart` would work, else 1."""
    bad = 0
    for mark, says, todo in _findings():
        print(f"{mark:<6}{says}" + (f"\n      -> {todo}" if todo else ""), flush=True)
        bad += mark == "BAD"
    print(f"mmalign quickstart would not work: see the {bad} marked BAD." if bad else "mmalign quickstart would work.")
    return 1 if bad else 0


def _findings() -> Iterator[Finding]:
    running = {name: _start(name) for name in USES if installed(name)}
    yield "ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", ""
    yield from _versions()
    facts: dict[str, dict[str, Any]] = {}
    for name, process in running.items():
        yield _finished(name, process, facts)
    yield from _card(facts.get("torch"))
    yield from _room()
    if not (embedded_path() / "model_index.json").is_file():
        yield "BAD", f"{embedded_path()}: the embedded model is missing", "install mmalign again"


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    """What mmalign requires against what is there; of its extras only what is there."""
    from packaging.requirements import Requirement

    if not installed("mmalign"):
        yield "BAD", "mmalign is not installed", "in its folder, pip install -c constraints.txt -e ."
        return
    fine = []
    asked_for = (line for line in metadata.requires("mmalign") or [] if "dev" not in line.partition(";")[2])
    for requirement in map(Requirement, asked_for):
        found, asked = installed(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found and requirement.specifier.contains(found, prereleases=True):
            fine.append(f"{requirement.name} {found}")
        elif found or not requirement.marker:  # extras have a marker
            mark = "note" if requirement.marker else "BAD"
            yield mark, f"{asked} is needed, and {found or 'none'} is installed", f"pip install '{asked}'"
    yield "ok", f"mmalign {installed('mmalign')} with {', '.join(dict.fromkeys(fine))}", ""


def _start(name: str) -> Any:
    tell = f"print(json.dumps({{'version': {name}.__version__, **({FACTS.get(name, '{}')})}}))"
    code = "\n".join(["import json, os, torch", f"import {name}", USES[name], tell])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finished(name: str, process: Any, facts: dict[str, dict[str, Any]]) -> Finding:
    """Whether a library's process went well; what it told is added to the facts. "+cu130" and the like is a build."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = "", "no answer within five minutes"
    if process.returncode != 0:
        last = (err.strip().splitlines() or [f"ended by signal {-(process.returncode or 0)}"])[-1]
        todo = f"install a {name} that was made for this torch (constraints.txt has versions that go together)"
        if name == "torch":
            todo = "install a torch that was made for this Python, card and driver"
        elif name != "torchvision":
            todo += f", or pip uninstall {name}: diffusers and transformers import it wherever it is installed"
        return "BAD", f"{name} {installed(name)} is broken: {last}", todo
    facts[name] = told = json.loads(out.splitlines()[-1])
    torch = facts.get("torch", told)["version"]
    build, wanted = told["version"].partition("+")[2], torch.partition("+")[2]
    if told.get("built", torch) != torch or (build and wanted and build != wanted):
        made_for = f"torch {told['built']}" if "built" in told else build
        return "note", f"{name} {told['version']} works, but was built for {made_for}, not torch {torch}", ""
    return "ok", f"{name} {told['version']} works", ""


def _card(torch: dict[str, Any] | None) -> Iterator[Finding]:
    """The card with its driver, and what computes attention there."""
    driver = _driver()
    if torch and torch["card"]:
        free, total = (size / GIB for size in torch["free"])
        cuda = f"driver {driver or 'unknown'}, CUDA {torch['cuda']}, bf16 {'yes' if torch['bf16'] else 'no'}"
        yield "ok", f"{torch['card']}: {free:.1f} of {total:.1f} GiB free, {cuda}", ""
        unet = "xformers" if installed("xformers") else "sdpa (xformers: pip install 'mmalign[xformers]')"
        flash = "flash-attn" if installed("flash-attn") else "sdpa"
        says = f"attention: UNets {unet}; transformers on diffusers' dispatcher {flash}; others sdpa"
        yield "ok", f"{says}. Training first checks it against math", ""
        return
    if driver and torch and torch["cuda"]:
        todo = "update the driver, or install a torch built for an older CUDA"
        yield "note", f"a card with driver {driver} that torch, built for CUDA {torch['cuda']}, cannot use", todo
    elif driver:
        yield "note", f"a card with driver {driver}, and a torch without CUDA", "install a torch built for CUDA"
    yield "note", f"no usable NVIDIA card: the CPU ({os.cpu_count()} cores), float32 (no bf16), attention sdpa", ""


def _driver() -> str:
    """The NVIDIA driver's version; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return ""


def _room() -> Iterator[Finding]:
    """Free disk where the command was called, and free memory, against what quickstart takes."""
    room = {"disk here": shutil.disk_usage(Path.cwd()).free}
    if installed("psutil"):
        import psutil

        room["memory"] = psutil.virtual_memory().available
    for what, needed in NEEDED.items():
        if what in room:
            enough = room[what] >= needed
            todo = "" if enough else f"quickstart takes up to {needed / GIB:.1f} GiB; make room"
            yield "ok" if enough else "BAD", f"{room[what] / GIB:.1f} GiB of {what} free", todo
