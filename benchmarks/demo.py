"""How the demo holds up.

python benchmarks/demo.py start [--runs 5]     from starting the process to the first page; writes into demo.md
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

REPORT = Path(__file__).parent / "demo.md"


def write(title: str, text: str) -> None:
    """Puts a section into the report, in place of the one of that title."""
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else "# The demo, measured\n"
    head, *sections = before.split("\n## ")
    kept = [section for section in sections if not section.startswith(f"{title}\n")]
    parts = [head.rstrip(), *(section.rstrip() for section in [*kept, f"{title}\n\n{text}"])]
    REPORT.write_text("\n\n## ".join(parts) + "\n", encoding="utf-8")


def first_page(folder: str) -> tuple[float, float]:
    """Seconds from starting `mmalign demo` to its first page (HTTP 200), and the processor seconds it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmalign", "demo", "--port", str(port), "--data-dir", folder]
    started = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                        assert b"gradio" in page.read()
                        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                        ticks = int(fields[11]) + int(fields[12])
                        return time.monotonic() - started, ticks / os.sysconf("SC_CLK_TCK")
                except urllib.error.URLError:
                    time.sleep(0.02)
            raise RuntimeError("the demo ended before it showed a page")
        finally:
            process.terminate()


def start(runs: int) -> None:
    """Measures the start."""
    with tempfile.TemporaryDirectory() as folder:
        taken = [first_page(folder) for _ in range(runs)]
    seconds, spent = (sorted(values) for values in zip(*taken, strict=True))
    write(
        "Start",
        f"From starting `mmalign demo` to its first page (HTTP 200): median {statistics.median(seconds):.1f} s"
        f" ({seconds[0]:.1f} to {seconds[-1]:.1f}) of {runs} starts, with {statistics.median(spent):.1f} s of processor"
        f" time. Models load at first use. {os.cpu_count()} cores, Python {platform.python_version()}, with a load of"
        f" {os.getloadavg()[0]:.1f} at the end: other work ran beside it where that is more than 2.\n\n"
        "    python benchmarks/demo.py start",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("start").add_argument("--runs", type=int, default=5)
    arguments = vars(parser.parse_args())
    {"start": start}[arguments.pop("part")](**arguments)
    print(REPORT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
