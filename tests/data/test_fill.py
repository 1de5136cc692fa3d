"""Filling a cache from data with everything wrong in it, killed, and by several processes at once."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import storage
from mmalign.data import fill
from mmalign.data.cache import Facts, open_cache, verify
from mmalign.data.fill import Fill
from mmalign.data.importers import read_comparisons
from mmalign.records import UserError
from tests.tiny import tiny_pipeline

FACTS = Facts({"vae": 1}, {"text": 1}, {"name": "d"})


def encoded(seed, kind="PNG", size=(20, 16), mode="RGB"):
    array = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array).resize(size, Image.Resampling.BICUBIC).convert(mode).save(stream, kind)
    return stream.getvalue()


def hostile(folder: Path, count: int, bad_share: float = 0.02, large: tuple[int, int] = (1200, 1000)) -> Counter:
    """Writes `count` rows, a share of them bad in ten ways in turn; returns how many there are of each way."""
    (folder / "media").mkdir(parents=True)
    huge = encoded(7, "JPEG", large)
    ways = ["truncated", "zero", "wrong type", "cmyk", "1x1", "30 MP", "not utf-8", "missing", "identical", "tie"]
    every, made = round(1 / bad_share), Counter()
    with (folder / "comparisons.jsonl").open("wb") as file:
        for n in range(count):
            way = ways[n // every % len(ways)] if n % every == every - 1 else "good"
            made[way] += 1
            names, contents = [f"media/{n}-{k}.png" for k in range(2)], [encoded(2 * n), encoded(2 * n + 1)]
            spoiled = {
                "truncated": contents[1][:60],
                "zero": b"",
                "wrong type": b"%PDF-1.7 no picture",
                "cmyk": encoded(n, "JPEG", mode="CMYK"),
                "1x1": encoded(n, size=(1, 1)),
                "30 MP": huge,
                "identical": contents[0],
            }
            for name, content in zip(names, [contents[0], spoiled.get(way, contents[1])], strict=True):
                if way != "missing" or name != names[1]:
                    (folder / name).write_bytes(content)
            row = {"id": f"row {n}", "prompt": f"fox {n % 50}", "media": names, "score": [1, 1 if way == "tie" else 0]}
            line = json.dumps(row).encode()
            file.write((line.replace(b"fox", b"f\xff\xfex") if way == "not utf-8" else line) + b"\n")
    return made


def filling(cache_dir, data, model, **settings):
    def encoders():
        import mmalign

        return mmalign.load(model, only="encoders", device="cpu")

    return Fill(Path(cache_dir), FACTS, read_comparisons(data, strict=False), encoders, workers=2, **settings)


def files(cache_dir):
    return {
        str(path.relative_to(cache_dir)): storage.sha256(path)
        for path in sorted(cache_dir.rglob("*"))
        if path.is_file()
    }


def check_counts(cache, made, count):
    """Rows in = rows cached + rows listed, by reason."""
    listed = [json.loads(line) for line in (cache.folder / "quarantine.jsonl").read_text().splitlines()]
    reasons = Counter(row["reason"] for row in listed)
    assert len(cache) + len(listed) == count
    assert len(cache) == made["good"] + made["cmyk"] + made["30 MP"]
    assert reasons == +Counter(
        undecodable=made["truncated"] + made["zero"] + made["wrong type"],
        too_small=made["1x1"],
        not_utf8=made["not utf-8"],
        missing_file=made["missing"],
        identical=made["identical"],
        tie=made["tie"],
    )
    counts = cache.counts
    assert counts["read"] == count == counts["cached"] + sum(reasons.values())
    assert {row["row"] for row in listed}.isdisjoint({int(item.id.split()[1]) + 1 for item in cache})
    assert all(row["detail"] for row in listed if row["reason"] in ("undecodable", "too_small", "missing_file"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fill, "LOOK_ROWS", 16)
    monkeypatch.setattr(fill, "SHARD_PIECES", 8)


def test_bad_rows_are_listed_by_reason_and_nothing_vanishes(tmp_path, tiny_sdxl, small):
    made = hostile(tmp_path / "data", 100, bad_share=0.2)
    assert min(made.values()) == 2
    cache = filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl, max_quarantined=0.2)()
    check_counts(cache, made, 100)
    assert not list((tmp_path / "cache").glob("unfinished*"))


def test_too_many_bad_rows_stop_the_fill_with_a_list(tmp_path, tiny_sdxl, small):
    hostile(tmp_path / "data", 100, bad_share=0.2)
    with pytest.raises(UserError, match=r"12 of 100 rows are broken \(.*2 not_utf8.*quarantine.jsonl"):
        filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl)()
    listed = (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()
    assert len(listed) == 16  # ties and identical pairs too, which are no fault
    assert len(filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl, max_quarantined=0.2)()) == 84


def test_an_interrupted_fill_goes_on_to_the_same_bytes(tmp_path, tiny_sdxl, small, monkeypatch):
    hostile(tmp_path / "data", 60, bad_share=0.2)
    settings = {"max_quarantined": 0.3}
    filling(tmp_path / "whole", tmp_path / "data", tiny_sdxl, **settings)()
    real = storage.atomic_file
    for survive in range(0, 30, 3):
        left = [survive]

        def stops(path, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(path)

        monkeypatch.setattr(storage, "atomic_file", stops)
        try:
            filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl, **settings)()
            break
        except KeyboardInterrupt:
            continue
    assert survive > 3
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


def test_more_data_encodes_only_what_is_new(tmp_path, tiny_sdxl, small):
    hostile(tmp_path / "data", 20)
    filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl)()
    before = set(files(tmp_path / "cache"))
    with (tmp_path / "data" / "comparisons.jsonl").open("a") as file:
        (tmp_path / "data" / "new.png").write_bytes(encoded(999))
        row = {"id": "row 20", "prompt": "fox 1", "media": ["new.png", "media/0-0.png"], "score": [1, 0]}
        file.write(json.dumps(row) + "\n")
    more = filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl)
    cache = Fill(more.cache_dir, Facts({"vae": 1}, {"text": 1}, {"name": "e"}), more.data, more.encoders)()
    new = set(files(tmp_path / "cache")) - before
    assert len([name for name in new if name.startswith("media")]) == 1
    assert not [name for name in new if name.startswith("prompts")]
    assert len(cache) == 21


def test_damage_is_found_and_made_again(tmp_path, tiny_sdxl, small):
    hostile(tmp_path / "data", 20)
    cache = filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl)()
    assert verify(tmp_path / "cache", FACTS) == []
    media = sorted((tmp_path / "cache").glob("media-*/*.safetensors"))
    content = bytearray(media[0].read_bytes())
    content[-1] ^= 1
    media[0].write_bytes(content)
    media[1].unlink()
    damaged = verify(tmp_path / "cache", FACTS)
    assert [Path(name).name for name in damaged] == [media[0].name, media[1].name]
    assert open_cache(tmp_path / "cache", FACTS) is None
    again = filling(tmp_path / "cache", tmp_path / "data", tiny_sdxl)()
    assert len(again) == len(cache)
    assert verify(tmp_path / "cache", FACTS) == []


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.data.test_fill import filling, fill
fill.LOOK_ROWS, fill.SHARD_PIECES = {rows}, {pieces}
print(len(filling(*sys.argv[1:4], max_quarantined=0.3)()))
"""


def worker(cache_dir, data, model, rows=16, pieces=8):
    code = WORKER.format(root=str(Path(__file__).parents[2]), rows=rows, pieces=pieces)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(cache_dir), str(data), str(model)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_two_processes_fill_one_cache(tmp_path, tiny_sdxl, small):
    made = hostile(tmp_path / "data", 60, bad_share=0.2)
    together = [worker(tmp_path / "cache", tmp_path / "data", tiny_sdxl) for _ in range(2)]
    outcomes = [(*process.communicate(timeout=300), process.returncode) for process in together]
    assert [code for _, _, code in outcomes] == [0, 0], outcomes
    filling(tmp_path / "whole", tmp_path / "data", tiny_sdxl, max_quarantined=0.3)()
    check_counts(open_cache(tmp_path / "cache", FACTS), made, 60)
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_thousand_rows_two_percent_bad_killed_ten_times(tmp_path):
    model = tiny_pipeline(tmp_path / "model", xl=True)
    made = hostile(tmp_path / "data", 20_000, large=(6000, 5000))
    whole = filling(tmp_path / "whole", tmp_path / "data", model)
    started = time.monotonic()
    check_counts(whole(), made, 20_000)
    took = time.monotonic() - started
    chance, kills = random.Random(0), 0
    while kills < 10:
        process = worker(tmp_path / "cache", tmp_path / "data", model, fill.LOOK_ROWS, fill.SHARD_PIECES)
        try:
            process.wait(timeout=8 + chance.random() * took / 8)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills == 10
    last = worker(tmp_path / "cache", tmp_path / "data", model, fill.LOOK_ROWS, fill.SHARD_PIECES)
    assert last.communicate()[0].strip() == str(made["good"] + made["cmyk"] + made["30 MP"])
    assert files(tmp_path / "cache") == files(tmp_path / "whole")
    print(f"20,000 rows in {took:.0f} s; killed {kills} times: {made}, {torch.__version__}")
