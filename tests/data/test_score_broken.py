"""Ten thousand rows with broken files among them, and a scorer that is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.data.media import open_source
from mmalign.data.score import score_media
from mmalign.records import MAX_PIXELS
from mmalign.scoring import load_scorer
from tests.conftest import picture

KINDS = {
    "truncated": "cannot be decoded",
    "zero bytes": "cannot be decoded",
    "no picture": "cannot be decoded",
    "cut header": "cannot be decoded",
    "too large": "pixels",
    "missing": "no such picture",
    "folder": "cannot be decoded",
    "no prompt": "has no prompt",
}


def broken(folder: Path) -> dict[str, str | None]:
    """One broken file of each kind; None for the kind that lacks a prompt."""
    good = folder / "0.png"
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
    data = good.read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "zero bytes.png").write_bytes(b"")
    (folder / "no picture.png").write_bytes(b"<html>404</html>")
    (folder / "cut header.png").write_bytes(data[:12])
    Image.new("1", (MAX_PIXELS // 4096 + 1, 4096)).save(folder / "too large.png")
    (folder / "folder.png").mkdir()
    return {kind: f"{kind}.png" for kind in KINDS} | {"no prompt": "0.png"}


def write_table(folder: Path, count: int, share: float) -> dict[int, str]:
    """`table.parquet` of `count` rows; returns the broken rows' kinds."""
    folder.mkdir()
    files, chance = broken(folder), random.Random(0)
    places = chance.sample(range(count), round(count * share))
    bad = {place: list(KINDS)[n % len(KINDS)] for n, place in enumerate(places)}
    rows = [
        {
            "prompt": None if bad.get(n) == "no prompt" else f"a fox number {n % 97}",
            "file_name": files[bad[n]] if n in bad else f"{n % 8}.png",
        }
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    return bad


def check(table: Path, count: int, bad: dict[int, str]) -> Counter:
    """Every good row has a score, every bad one its reason; counts of the reasons."""
    rows = pq.read_table(table).to_pylist()
    assert [row["number"] for row in rows] == list(range(count))
    for number, row in enumerate(rows):
        assert (row["embedded-hps"] is None) == (number in bad), row
        assert (row["error"] is None) != (number in bad), row
        if number in bad:
            assert KINDS[bad[number]] in row["error"], row
    return Counter(bad.values())


def test_good_rows_are_scored_and_bad_ones_listed(tmp_path):
    bad = write_table(tmp_path / "t", 400, 0.1)
    assert set(bad.values()) == set(KINDS)
    judges = {"embedded-hps": load_scorer("embedded-hps")}
    one = score_media(open_source(tmp_path / "t" / "table.parquet"), judges)
    check(one, 400, bad)
    many = score_media(open_source(tmp_path / "t" / "table.parquet"), judges, tmp_path / "x.parquet", num_workers=7)
    assert pq.read_table(one).equals(pq.read_table(many))


@pytest.mark.slow
def test_ten_thousand_rows_three_percent_broken_killed_twice(tmp_path):
    bad = write_table(tmp_path / "t", 10_000, 0.03)
    table = str(tmp_path / "t" / "table.parquet")

    def process(output: Path):
        command = [sys.executable, "-m", "mmalign", "score", table, "--output", str(output)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    started = time.monotonic()
    whole = process(tmp_path / "whole.parquet")
    said = whole.communicate()[0]
    took = time.monotonic() - started
    assert whole.returncode == 0
    assert "9700 scored, 300 not scored" in said
    found = check(tmp_path / "whole.parquet", 10_000, bad)
    folder = tmp_path / ".killed.parquet.parts"
    for parts in (5, 20):  # of forty
        victim = process(tmp_path / "killed.parquet")
        while victim.poll() is None and len(list(folder.glob("[!.]*.parquet"))) < parts:
            time.sleep(0.05)
        os.kill(victim.pid, signal.SIGKILL)
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL
    assert process(tmp_path / "killed.parquet").wait() == 0
    assert pq.read_table(tmp_path / "killed.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not folder.exists()
    print(f"10,000 rows in {took:.0f} s; {dict(found)}")
