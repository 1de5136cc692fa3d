"""How the demo holds up.

python benchmarks/demo.py start [--runs 5]     from starting the process to the first page; writes into demo.md
python benchmarks/demo.py votes [--seconds 60]  20 people who vote at once, without and with pictures being made
"""

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from mmalign.data.candidates import encoded
from mmalign.evaluation.votes import Votes

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


def stocked(folder: Path, items: int) -> Votes:
    """A data folder with pictures to vote on, of noise: what the models of `serving` are called made them."""
    votes, rng = Votes(folder), np.random.default_rng(0)
    for seed in range(items):
        noise = {name: Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for name in ("base", "other")}
        files = {name: votes.keep(encoded(picture), "png") for name, picture in noise.items()}
        votes.add(f"prompt {seed}", {"seed": seed}, files)
    return votes


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """The real demo on a data folder, with the embedded model twice; its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmalign", "demo", "--model", "other=embedded", "--port", str(port)]
    command += ["--data-dir", str(folder), "--runs", str(folder)]
    with (
        (folder / "log.txt").open("a") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    httpx.get(url, timeout=60)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield process, url
        finally:
            process.kill()


@dataclass
class Told:
    """What voters were told.

    Attributes:
        acknowledged: tokens of votes that were said to count, with the choice.
        seconds: from sending a vote to its answer; every one.
        wrong: what was answered instead.
    """

    acknowledged: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def ask(client: httpx.Client, name: str, *data: object) -> list:
    """An endpoint of the page, as the page itself asks it."""
    answer = client.post(f"/gradio_api/api/{name}", json={"data": data})
    if answer.status_code != 200:
        raise RuntimeError(f"{name}: {answer.status_code} {answer.text[:200]}")
    return answer.json()["data"]


def voting(url: str, voter: str, told: Told, stop: threading.Event, think: float) -> None:
    """One person: looks at the two pictures, thinks, votes; every fourth vote is a double click."""
    rng = np.random.default_rng(int.from_bytes(voter.encode()))
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.wait(think * rng.uniform(0.5, 1.5)):
            try:
                _, _, token, *rest = ask(client, "arena_next", voter, 2, "")
                for shown in rest[3:5]:
                    client.get("/" + shown.split('"')[1]).raise_for_status()
                choice = str(rng.choice(["1", "2", "0", "x"]))
                for again in range(1 + (rng.random() < 0.25)):
                    sent = time.perf_counter()
                    ask(client, "arena_vote", token, str(rng.choice(["1", "2"])) if again else choice)
                    told.seconds.append(time.perf_counter() - sent)
                told.acknowledged[token] = choice
            except (httpx.HTTPError, RuntimeError, IndexError) as error:
                if not stop.is_set():
                    told.wrong.append(f"{voter}: {error!r}")
                    return


@contextmanager
def crowd(url: str, voters: int = 20, think: float = 1.0) -> Iterator[Told]:
    """People who vote at once until the block ends."""
    told, stop = Told(), threading.Event()
    with ThreadPoolExecutor(voters) as pool:
        for number in range(voters):
            pool.submit(voting, url, f"voter {number}", told, stop, think)
        try:
            yield told
        finally:
            stop.set()


def lost_or_doubled(votes: Votes, told: Told) -> tuple[int, int]:
    """Acknowledged votes that are not there as they were first cast, and ballots that were counted twice."""
    places = {"1": (1, 2), "2": (2, 1), "0": (1, 1), "x": (1, 1)}
    cast = votes.all()
    there = {vote.token: (vote.places, vote.bad) for vote in cast}
    wanted = {token: (places[choice], choice == "x") for token, choice in told.acknowledged.items()}
    seen = Counter((vote.voter, vote.prompt) for vote in cast)
    return sum(there.get(token) != said for token, said in wanted.items()), sum(seen.values()) - len(seen)


def votes(seconds: float) -> None:
    """Measures votes of 20 people at once."""
    rows = ["| beside | votes | lost | doubled | errors | median ms | 95 % ms | longest ms |"]
    rows += ["|:--|--:|--:|--:|--:|--:|--:|--:|"]
    for beside in (False, True):
        with tempfile.TemporaryDirectory() as name:
            store = stocked(Path(name), int(4 * seconds))
            with serving(Path(name)) as (_, url):
                over = threading.Event()
                with ThreadPoolExecutor(1) as maker:
                    made = maker.submit(make_pictures, url, over) if beside else None
                    with crowd(url) as told:
                        time.sleep(seconds)
                    over.set()
            lost, doubled = lost_or_doubled(store, told)
            middle, most, longest = 1000 * np.quantile(told.seconds, [0.5, 0.95, 1])
            what = f"{made.result()} pictures being made" if made else "nothing"
            cells = [what, len(told.acknowledged), lost, doubled, len(told.wrong)]
            rows.append(f"| {' | '.join(map(str, cells))} | {middle:.0f} | {most:.0f} | {longest:.0f} |")
    write(
        "Votes",
        f"20 people for {seconds:g} s, each of whom asks for a ballot, fetches its two pictures, thinks for a second"
        " and votes; every fourth vote is sent twice. Lost: acknowledged, but not in the file as first cast. The time"
        f" is that from sending a vote to its answer. {os.cpu_count()} cores, which the people share, Python"
        f" {platform.python_version()}, with a load of {os.getloadavg()[0]:.1f} at the end.\n\n"
        + "\n".join(rows)
        + "\n\n    python benchmarks/demo.py votes",
    )


def make_pictures(url: str, over: threading.Event) -> int:
    """Has the Compare tab make pictures, one after the other; how many."""
    from gradio_client import Client

    client = Client(url, verbose=False)
    for number in count():
        if over.is_set():
            return number
        client.predict("a red fox", ["base"], [], 0, 1, 12, 4.0, 1.0, None, api_name="/compare")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("start").add_argument("--runs", type=int, default=5)
    parts.add_parser("votes").add_argument("--seconds", type=float, default=60)
    arguments = vars(parser.parse_args())
    {"start": start, "votes": votes}[arguments.pop("part")](**arguments)
    print(REPORT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
