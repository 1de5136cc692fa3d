import pytest

from mmalign.data.label import all_pairs, best_worst, comparison, extremes, ranked, weakest, win_shares
from mmalign.records import UserError

PROMPTS = ["a", "b", "c", "d"]
MEDIA = [[f"{prompt}{number}.png" for number in range(3)] for prompt in PROMPTS]
SCORES = [[0.1, 0.9, 0.5], [2.0, 2.0, 2.0], [0.3, 0.1, 0.2], [0.0, 0.0, 5.0]]


def test_best_and_worst_are_paired_and_ties_dropped():
    pairs, counts = best_worst(PROMPTS, MEDIA, SCORES)
    assert [pair.media for pair in pairs] == [
        ("a1.png", "a0.png"),
        ("c0.png", "c1.png"),
        ("d2.png", "d0.png"),
    ]
    assert pairs[0].score == (0.9, 0.1)
    assert counts == {"prompts": 4, "ties": 1, "below_margin": 0, "dropped": 0, "kept": 3}


def test_small_margins_are_dropped():
    pairs, counts = best_worst(PROMPTS, MEDIA, SCORES, min_margin=0.5)
    assert [pair.prompt for pair in pairs] == ["a", "d"]
    assert counts["below_margin"] == 1
    pairs, counts = best_worst(PROMPTS, MEDIA, SCORES, drop_fraction=0.34)
    assert [pair.prompt for pair in pairs] == ["a", "d"]
    assert (counts["dropped"], counts["kept"]) == (1, 2)


def test_ids_depend_on_prompt_and_sources_alone():
    sources = [["seed-1", "seed-2", "seed-3"]] * 4
    first, _ = best_worst(PROMPTS, MEDIA, SCORES, sources=sources)
    other = [[f"elsewhere/{name}" for name in row] for row in MEDIA]
    second, _ = best_worst(PROMPTS[::-1], other[::-1], SCORES[::-1], sources=sources)
    assert {pair.id for pair in first} == {pair.id for pair in second}
    assert len({pair.id for pair in first}) == 3
    assert first[0].source == ("seed-2", "seed-1")


@pytest.mark.parametrize("scores", [[[1.0]], [[1.0, float("nan")]], [[1.0, 2.0, 3.0]], []])
def test_bad_scores_are_refused(scores):
    with pytest.raises(UserError):
        best_worst(["a"], [["x", "y"]], scores)


def test_ranked_lists_are_scored_by_the_share_of_comparisons_won():
    media = [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]]
    first, second = [[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 2.0]], [[3.0, 1.0, 2.0], [0.0] * 3, [0.0, 1.0, 1.0]]
    lists, counts = ranked(["one", "two", "three"], media, [first, second])
    assert counts == {"prompts": 3, "ties": 1, "kept": 2}
    assert lists[0].score == (1.0, 0.25, 0.25)  # beats 2 + 2, 1 + 0 and 0 + 1 of 4
    assert lists[1].score == (0.0, 0.5, 0.5)
    assert lists[0].media == ("a", "b", "c")
    assert lists[0].id != lists[1].id
    with pytest.raises(UserError, match="finite score"):
        ranked(["one"], media[:1], [[[1.0, float("nan"), 2.0]]])
    with pytest.raises(UserError, match="finite score"):
        ranked(["one"], [["a"]], [[[1.0]]])
    with pytest.raises(UserError, match="1 prompts"):
        ranked(["one"], media[:1], [first])


def test_the_arithmetic_of_a_group():
    assert extremes([1.0, 3.0, 3.0, 1.0]) == (1, 0)
    assert all_pairs([1.0, 3.0, 2.0]) == [(1, 0), (2, 0), (1, 2)]
    assert win_shares([[1.0, 3.0, 2.0], [1.0, 1.0, 2.0]]) == (0.0, 0.5, 0.75)
    assert weakest([3, 1, 2, 1, 1], 0.4).tolist() == [False, True, False, True, False]
    assert not weakest([], 0.5).any()


def test_a_key_tells_comparisons_apart():
    plain = comparison("p", ["x", "y"], [1, 0], ["a", "b"])
    assert comparison("p", ["x", "y"], [1, 0], ["a", "b"], ["user"]).id != plain.id
    assert comparison("p", ["x", "y"], [1, 0], ["a", "b"], user="u").id == plain.id
