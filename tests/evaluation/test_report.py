"""The report: made from little, self-contained, and true to the numbers."""

import re

import numpy as np
import pytest
from PIL import Image

from mmalign.evaluation.compare import Result
from mmalign.evaluation.report import grid, smoothed, write_report


def pictures(colour, n=3):
    return [Image.new("RGB", (64, 64), colour) for _ in range(n)]


def some_result(shift=1.0, n=60):
    base = np.random.default_rng(0).normal(size=n)
    sides = {"base": base, "aligned": base + np.where(np.arange(n) % 4 == 0, -shift, shift)}
    return Result(tuple(f"prompt {i}" for i in range(n)), {"judge <1>": sides, "second": sides})


PROMPTS = ["a fox & a hound", "<b>bold</b>", "a very long prompt " * 12]
LOG = [
    {
        "step": i,
        "loss": 0.7 - i / 100,
        "implicit_accuracy": 0.5,
        "chosen_log_ratio": 0.1 * i,
        "rejected_log_ratio": float("nan"),
    }
    | ({"validation/judge_change": i / 30} if i % 10 == 0 else {})
    for i in range(30)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    facts, roles = {"objective": "DPO"}, {"second": "held out"}
    path = write_report(folder, title="A run", result=some_result(), prompts=PROMPTS, base=pictures("grey"),
                        aligned=pictures("red"), metrics=LOG, facts=facts, roles=roles)  # fmt: skip
    assert {p.name for p in folder.iterdir()} == {"report.html", "grid.png", "scores.json"}
    return path.read_text(encoding="utf-8")


def test_it_needs_nothing_but_itself(page):
    assert "http" not in page
    assert "<script" not in page
    sources = re.findall(r'(?:src|href|srcset)="([^"]{0,40})', page)
    assert len(sources) >= 2 * len(PROMPTS) + 2 * 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_it_says_what_the_scores_say(page):
    text = re.sub(r"<[^>]+>", "", page)
    assert re.search(r"wins 75&nbsp;% of 60 comparisons", text)
    assert "better than the base" in text
    assert "objective" in text
    assert text.count("held out") == 1


def test_text_from_users_is_escaped(page):
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold" in page
    assert "judge &lt;1&gt;" in page


def test_light_and_dark(page):
    assert page.count("prefers-color-scheme: dark") == 1 + 4  # style, four charts


@pytest.mark.parametrize(("shift", "words"), [(-1.0, "worse than the base"), (0.0, "not clearly better or worse")])
def test_bad_news_is_told(tmp_path, shift, words):
    sides = {"base": pictures("grey"), "aligned": pictures("red")}
    path = write_report(tmp_path, title="t", result=some_result(shift), prompts=PROMPTS, **sides)
    assert words in path.read_text(encoding="utf-8")
    assert "Training" not in path.read_text(encoding="utf-8")


def test_grid_has_the_base_above_the_aligned(tmp_path):
    path = grid(tmp_path / "grid.png", ["one", "two", "three"], pictures("grey"), pictures("red"), columns=2, side=96)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 60)
    grey = (sheet == 128).all(-1)
    rows = [np.flatnonzero(mask.any(1)).min() for mask in (grey, red)]
    assert rows[0] < rows[1]
    assert red.sum() == pytest.approx(3 * 96 * 96, rel=0.03)


@pytest.mark.parametrize("size", [(64, 64), (30, 90), (700, 300)])
def test_grid_takes_any_shape(tmp_path, size):
    medium = [Image.new("RGB", size)]
    assert grid(tmp_path / "g.png", ["p"], medium, medium).is_file()


def test_smoothing_keeps_a_straight_line():
    line = np.arange(100.0)
    np.testing.assert_allclose(smoothed(line)[10:-10], line[10:-10])
    assert len(smoothed(np.ones(3))) == 3
