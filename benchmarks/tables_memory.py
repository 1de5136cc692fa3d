"""Peak memory and rate of `mmalign pairs` and `mmalign score` over tables of growing size.

    python benchmarks/tables_memory.py            # 10^4, 10^5, 10^6 rows; writes benchmarks/tables_memory.md

Each figure is of a fresh process. The pictures are all one tiny file, and the scorer takes no time: what is measured is
the way of the rows, not decoding or a model. pairs: prompts with 4 candidates each, two scores, the candidates of a
prompt far apart, as those of several models are. score: rows of a parquet table.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BLOCK = 100_000
MODELS = 4


def instant():
    """A scorer that scores at once, by the prompt's length."""
    import torch  # here, as pairs are made without it

    from mmalign.scoring.scorer import Card, Scorer

    class Instant(Scorer):
        card = Card(name="instant", family="none", folder=Path())

        def prepare(self, medium, *, condition=(), name=""):
            return None

        def judge(self, prepared, prompts):
            return {"score": torch.tensor([float(len(prompt)) for prompt in prompts])}

    return Instant()


def write_table(path: Path, prompts: int, models: int) -> None:
    """Rows of model 0 for all prompts, then of model 1, and so on."""
    Image.new("RGB", (8, 8), "red").save(path.parent / "a.png")
    Image.new("RGB", (8, 8), "blue").save(path.parent / "b.png")
    random = np.random.Generator(np.random.Philox(key=[0, prompts]))
    writer = None
    for model in range(models):
        for start in range(0, prompts, BLOCK):
            numbers = range(start, min(start + BLOCK, prompts))
            table = pa.table(
                {
                    "prompt": [f"a photo of thing number {n}, in the style of painter {n % 977}" for n in numbers],
                    "file_name": ["ab"[model % 2] + ".png" for _ in numbers],
                    "model": [f"model-{model}"] * len(numbers),
                    "first": random.normal(size=len(numbers)),
                    "second": random.normal(size=len(numbers)),
                }
            )
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    writer.close()


def measure(what: str, count: int) -> dict:
    """One figure, in this process."""
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.parquet"
        models = MODELS if what == "pairs" else 1
        code = f"import benchmarks.tables_memory as b; b.write_table(b.Path({str(table)!r}), {count}, {models})"
        subprocess.run([sys.executable, "-c", code], check=True)  # its memory is not ours
        started = time.monotonic()
        if what == "pairs":
            from mmalign.data.pairs import Rule, make_pairs

            made = make_pairs(str(table), Path(place) / "out", Rule(drop_fraction=0.2))
            assert made.prompts["prompts"] == count
        else:
            from mmalign.data.media import open_source
            from mmalign.data.score import score_media

            scores = score_media(open_source(table), {"instant": instant()})
            assert pq.read_metadata(scores).num_rows == count
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"what": what, "count": count, "seconds": round(seconds, 1), "peak_mib": round(peak)}


def main() -> None:
    """Measures all, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    parser.add_argument("--what", nargs="+", default=["pairs", "score"])
    parser.add_argument("--one", action="store_true", help="measure the first in this process and print it as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.what[0], given.counts[0])))
        return
    lines = ["| | rows in | seconds | rows a second | peak memory, MiB |", "| --- | ---: | ---: | ---: | ---: |"]
    for what in given.what:
        for count in given.counts:
            command = [
                sys.executable,
                "-m",
                "benchmarks.tables_memory",
                "--one",
                "--what",
                what,
                "--counts",
                str(count),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rows = count * (MODELS if what == "pairs" else 1)
            rate = rows / found["seconds"]
            lines.append(f"| {what} | {rows:,} | {found['seconds']:,} | {rate:,.0f} | {found['peak_mib']:,} |")
            print(lines[-1], flush=True)
    head = [
        "# Memory and rate of tables",
        "",
        "`python -m benchmarks.tables_memory`: pairs of prompts with four candidates each, scores of a table's rows;",
        f"one tiny picture, a scorer that takes no time. {platform.machine()}, 2 cores shared with other work.",
        "",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
