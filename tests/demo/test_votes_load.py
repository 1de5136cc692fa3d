"""Many people who vote at once on the real app, and a killed one; `benchmarks/demo.py votes` measures the same."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import demo as load


def until(enough, told, seconds=120):
    end = time.monotonic() + seconds
    while not enough():
        assert time.monotonic() < end, f"only {len(told.acknowledged)} votes; {told.wrong}"
        time.sleep(0.05)


def whole(votes, told, voters=20):
    assert told.wrong == []
    assert load.lost_or_doubled(votes, told) == (0, 0)
    cast = votes.all()
    assert {vote.token for vote in cast} == set(told.acknowledged)
    assert len(cast) == len(told.acknowledged)
    assert len({vote.voter for vote in cast}) == voters


def test_no_vote_is_lost_or_doubled_and_a_killed_app_keeps_them(tmp_path):
    votes = load.stocked(tmp_path, 60)
    with load.serving(tmp_path) as (process, url):
        with load.crowd(url, think=0.2) as told:
            until(lambda: len(told.acknowledged) >= 120 or told.wrong, told)
        whole(votes, told)
        with load.crowd(url, think=0.05) as more:
            until(lambda: len(more.acknowledged) >= 60 or more.wrong, more)
            assert more.wrong == []
            process.kill()
    kept = {vote.token for vote in votes.all()}
    assert {*told.acknowledged, *more.acknowledged} <= kept
    with load.serving(tmp_path) as (_, url), load.crowd(url, think=0.05) as after:
        until(lambda: len(after.acknowledged) >= 20 or after.wrong, after)
    assert after.wrong == []
    assert kept | set(after.acknowledged) <= {vote.token for vote in votes.all()}
    assert load.lost_or_doubled(votes, after) == (0, 0)


@pytest.mark.slow
def test_a_minute_of_twenty_voters(tmp_path):
    votes = load.stocked(tmp_path, 240)
    with load.serving(tmp_path) as (_, url), load.crowd(url) as told:
        time.sleep(60)
    whole(votes, told)
