import math
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest

from mmalign.evaluation.votes import BAD, TIE, Ratings, Vote, Votes, matchups, ordered, places_of, standings, voters
from mmalign.records import UserError


def stocked(folder, models=("a", "b"), items=3):
    votes = Votes(folder)
    for seed in range(items):
        files = {model: votes.keep(f"{model}{seed}".encode(), "png") for model in models}
        votes.add("a red fox", {"seed": seed}, files)
    return votes


def vote(models, places, voter="someone", files=None, number=0):
    return Vote("token", voter, "fox", {}, models, files or models, 0.0, places, False, number)


def simulated(strengths, count, ways, seed=0):
    """Votes of people whose taste is Bradley and Terry's, and Plackett and Luce's for more than two."""
    rng, names = np.random.default_rng(seed), list(strengths)
    found = []
    for number in range(count):
        shown = [names[i] for i in rng.choice(len(names), ways, replace=False)]
        liked = [strengths[name] + rng.gumbel() for name in shown]
        places = tuple(1 + sum(other > own for other in liked) for own in liked)
        found.append(vote(tuple(shown), places, files=tuple(f"{name}{number}" for name in shown)))
    return found


@pytest.mark.parametrize(
    ("choice", "ways", "places"),
    [
        ("1", 2, (1, 2)),
        ("2", 2, (2, 1)),
        ("21", 2, (2, 1)),
        (TIE, 2, (1, 1)),
        (BAD, 4, (1, 1, 1, 1)),
        ("3142", 4, (2, 4, 1, 3)),
        ("314", 4, (2, 4, 1, 3)),
    ],
)
def test_a_choice_names_the_media_best_first(choice, ways, places):
    assert places_of(choice, ways) == places


@pytest.mark.parametrize(("choice", "ways"), [("", 2), ("3", 2), ("11", 2), ("31", 4), ("12345", 4), ("1 2", 2)])
def test_what_is_no_vote_is_said(choice, ways):
    with pytest.raises(UserError, match="is no vote"):
        places_of(choice, ways)


def test_a_vote_is_kept_whole_and_once(tmp_path):
    votes = stocked(tmp_path)
    ballot = votes.issue("v", ["a", "b"], seed=1)
    assert votes.issue("v", ["a", "b"], seed=2) == ballot  # asking again gives no other one
    cast = votes.vote(ballot.token, "2")
    assert votes.vote(ballot.token, "1") == cast  # the first counts
    again = Votes(tmp_path).all()
    assert again == [cast]
    assert (cast.voter, cast.prompt, cast.models, cast.files) == ("v", "a red fox", ballot.models, ballot.files)
    assert cast.places == (2, 1)
    assert (tmp_path / "media" / cast.files[0]).read_text() == f"{cast.models[0]}{cast.settings['seed']}"


def test_a_token_cannot_be_made_up_and_a_replaced_ballot_is_closed(tmp_path):
    votes = stocked(tmp_path, "abcd")
    first = votes.issue("v", list("abcd"), 2)
    assert votes.issue("v", list("abcd"), 4).token != first.token
    for token in ("0" * 32, first.token):
        with pytest.raises(UserError, match="not open"):
            votes.vote(token, "1")
    assert votes.all() == []


def test_a_retry_from_many_threads_is_one_vote(tmp_path):
    votes = stocked(tmp_path)
    token = votes.issue("v", ["a", "b"]).token
    with ThreadPoolExecutor(16) as pool:
        cast = list(pool.map(lambda _: votes.vote(token, "1").number, range(64)))
    assert set(cast) == {1}
    assert len(votes.all()) == 1


def test_nobody_judges_the_same_media_twice(tmp_path):
    votes = stocked(tmp_path, items=3)
    seen = set()
    while ballot := votes.issue("v", ["a", "b"]):
        votes.vote(ballot.token, "1")
        seen.add(ballot.settings["seed"])
    assert seen == {0, 1, 2}
    assert len(votes.all()) == 3
    assert votes.issue("w", ["a", "b"]) is not None


def test_a_voters_own_prompt_is_shown_to_them_alone(tmp_path):
    votes = Votes(tmp_path)
    files = {model: votes.keep(model.encode(), "png") for model in "ab"}
    votes.add("mine", {"seed": 0}, files, owner="v")
    assert votes.issue("w", ["a", "b"]) is None
    assert votes.issue("w", ["a", "b"], prompt="mine") is None
    assert votes.issue("v", ["a", "b"]) is None
    assert votes.issue("v", ["a", "b"], prompt="mine").prompt == "mine"


def test_media_that_are_gone_or_the_same_are_not_shown(tmp_path):
    votes = Votes(tmp_path)
    same = votes.keep(b"same", "png")
    votes.add("fox", {"seed": 0}, {"a": same, "b": same})
    votes.add("fox", {"seed": 1}, {"a": same, "b": "gone.png"})
    votes.add("fox", {"seed": 2}, {"a": same})
    assert votes.issue("v", ["a", "b"]) is None


def test_sides_are_chance_and_chance_is_a_function_of_the_seed(tmp_path):
    stores = [stocked(tmp_path / name) for name in ("one", "other")]
    first = [[store.issue(f"v{n}", ["a", "b"], seed=n).models[0] for n in range(20)] for store in stores]
    assert first[0] == first[1]
    assert 4 < first[0].count("a") < 16


def test_voters_are_salted_hashes(tmp_path):
    one, other = Votes(tmp_path / "one"), Votes(tmp_path / "other")
    assert one.voter("ann") == Votes(tmp_path / "one").voter("ann") != other.voter("ann")
    assert one.voter("ann") != one.voter("bob")
    assert (tmp_path / "one" / "salt").stat().st_mode & 0o777 == 0o600


def test_another_file_is_said_to_be_one(tmp_path):
    (tmp_path / "votes.sqlite").write_text("not a database, but a text that is long enough to be looked at")
    with pytest.raises(UserError, match="holds no votes"):
        Votes(tmp_path)


def test_ratings_are_those_of_all_votes_whoever_asked_before(tmp_path):
    votes = stocked(tmp_path, "abc", items=6)
    for _ in range(6):
        votes.vote(votes.issue("v", list("abc")).token, "1")
        votes.ratings()
    afresh = Votes(tmp_path).ratings()
    assert [afresh[name].mu for name in "abc"] == [votes.ratings()[name].mu for name in "abc"]
    assert len({afresh[name].mu for name in "abc"}) > 1


@pytest.mark.parametrize("ways", [2, 4])
def test_standings_find_the_order_and_their_intervals_cover(ways):
    strengths = {"a": 0.0, "b": 0.8, "c": 1.6, "d": 2.6}
    covered = []
    for seed in range(3):
        cast = simulated(strengths, 300, ways, seed)
        ratings = Ratings()
        for one in cast:
            ratings.add(one)
        rows = standings(cast, ratings, resamples=80, seed=seed)
        assert rows[0].model == "d"
        assert rows[-1].model == "a"
        assert sum(row.votes for row in rows) == 300 * ways
        mean = sum(strengths.values()) / 4
        covered += [row.strength_low <= strengths[row.model] - mean <= row.strength_high for row in rows]
        assert all(row.low < row.rating < row.high for row in rows)
    assert sum(covered) >= 10  # of 12 at 95 %


def test_ties_and_both_bad_move_nobody():
    ratings = Ratings()
    ratings.add(vote(("a", "b"), (1, 1)))
    assert ratings["a"].mu == pytest.approx(ratings["b"].mu)
    (one, other) = standings([vote(("a", "b"), (1, 1))], ratings)
    assert one.won == other.won == 0.5
    assert one.strength == pytest.approx(0)
    assert standings([], ratings) == []


def test_matchmaking_asks_what_is_least_known():
    ratings = Ratings()
    for _ in range(30):
        ratings.add(vote(("a", "b"), (1, 2)))
        ratings.add(vote(("b", "a"), (2, 1)))
    assert set(matchups(ratings, ["a", "b", "new"], 2, random.Random(0))[-1]) == {"a", "b"}
    fresh = [matchups(Ratings(), ["a", "b", "c"], 2, random.Random(seed))[0] for seed in range(60)]
    assert set(fresh) == set(combinations("abc", 2))  # chance decides among equals
    assert fresh == [matchups(Ratings(), ["a", "b", "c"], 2, random.Random(seed))[0] for seed in range(60)]


def test_matchmaking_learns_faster_than_chance():
    strengths = dict(zip("abcdef", (0, 0, 0, 0, 3, 6), strict=True))

    def unknown(choose, seed):
        ratings, rng, noise = Ratings(), random.Random(seed), np.random.default_rng(seed)
        for _ in range(120):
            shown = choose(ratings, rng)
            liked = [strengths[name] + noise.gumbel() for name in shown]
            ratings.add(vote(tuple(shown), (1, 2) if liked[0] > liked[1] else (2, 1)))
        return max(ratings.information(*pair) for pair in combinations(strengths, 2))

    clever = [unknown(lambda ratings, rng: matchups(ratings, list(strengths), 2, rng)[0], seed) for seed in range(4)]
    blind = [unknown(lambda ratings, rng: rng.sample(list(strengths), 2), seed) for seed in range(4)]
    assert max(clever) < min(blind)


def people(habits, items, seed=0):
    """Votes on the same media: `habits` is each voter's probability of choosing what is better."""
    rng = np.random.default_rng(seed)
    return [
        vote(("a", "b"), (1, 2) if rng.random() < right else (2, 1), voter, (f"a{item}", f"b{item}"))
        for item in range(items)
        for voter, right in habits.items()
    ]


def test_who_votes_by_chance_or_against_all_is_an_outlier():
    honest = {f"honest{n}": 0.85 for n in range(6)}
    found = voters(people({**honest, "chance": 0.5, "against": 0.1}, 80))
    assert {row.voter for row in found if row.outlier} == {"chance", "against"}
    by_name = {row.voter: row for row in found}
    assert by_name["honest0"].agreed / by_name["honest0"].compared > 0.75
    assert by_name["honest0"].by_chance < 1e-4
    assert by_name["against"].by_chance > 0.99


def test_nobody_is_an_outlier_after_few_votes_or_without_agreement():
    honest = {f"honest{n}": 0.85 for n in range(6)}
    assert not any(row.outlier for row in voters(people({**honest, "chance": 0.5}, 5)))
    assert not any(row.outlier for row in voters(people({f"chance{n}": 0.5 for n in range(8)}, 80)))
    alone = voters(people({"alone": 0.5}, 80))[0]
    assert (alone.votes, alone.compared, alone.outlier) == (80, 0, False)
    assert math.isclose(alone.by_chance, 1)


def test_an_order_is_its_pairs():
    assert set(ordered(vote(("a", "b", "c"), (2, 1, 2)))) == {("b", "a"), ("b", "c")}


def test_the_disk_keeps_what_is_acknowledged(tmp_path):
    votes = stocked(tmp_path)
    votes.vote(votes.issue("v", ["a", "b"]).token, "1")
    other = sqlite3.connect(tmp_path / "votes.sqlite")  # sees only what is committed
    assert other.execute("SELECT count(*) FROM votes").fetchone() == (1,)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert other.execute("SELECT count(*) FROM ballots").fetchone() == (0,)
