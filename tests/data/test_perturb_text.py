import pytest

from mmalign.data import perturb_text

THREE = "A dog barks, followed by a car horn and then a man speaks."
TWO = "a bell rings before a door slams"


def many(make, tries=40):
    """What different keys give."""
    return [make(f"item {n}") for n in range(tries)]


def test_events_of_a_caption():
    assert perturb_text.events(THREE) == ["a dog barks", "a car horn", "a man speaks"]
    assert perturb_text.events("After rain falls, thunder rolls") == ["rain falls", "thunder rolls"]
    assert perturb_text.events("A baby cries while a woman sings, and a clock ticks") == [
        "a baby cries",
        "a woman sings",
        "a clock ticks",
    ]
    assert perturb_text.events("The thenar and beforehand.") == ["the thenar and beforehand"]


def test_reordered_events_keep_connectives_and_are_never_the_caption():
    made = many(lambda key: perturb_text.reorder_events(THREE, 0, key))
    assert THREE not in made
    assert set(made) == {
        "A dog barks, followed by a man speaks and then a car horn.",
        "A car horn, followed by a dog barks and then a man speaks.",
        "A car horn, followed by a man speaks and then a dog barks.",
        "A man speaks, followed by a dog barks and then a car horn.",
        "A man speaks, followed by a car horn and then a dog barks.",
    }
    assert set(many(lambda key: perturb_text.reorder_events(TWO, 0, key))) == {"a door slams before a bell rings"}
    assert perturb_text.reorder_events("After rain falls, thunder rolls.", 0, 0) == "After thunder rolls, rain falls."
    assert perturb_text.reorder_events("a cat meows then A cat meows", 0, 0) is None
    assert perturb_text.reorder_events("a cat meows while rain falls", 0, 0) is None  # at once: there is no other order
    together = "a cat meows while rain falls then a bell rings"
    assert perturb_text.reorder_events(together, 0, 0) == "a bell rings then a cat meows while rain falls"


def test_dropped_and_wrong_events():
    made = set(many(lambda key: perturb_text.drop_event(THREE, 0, key)))
    assert made == {
        "A car horn and then a man speaks.",
        "A dog barks and then a man speaks.",
        "A dog barks, followed by a car horn.",
    }
    after = set(many(lambda key: perturb_text.drop_event("After rain falls, thunder rolls", 0, key)))
    assert after == {"Rain falls", "Thunder rolls"}
    made = set(many(lambda key: perturb_text.swap_event(TWO, "A dog barks, then a bell rings", 0, key)))
    assert made == {"a dog barks before a door slams", "a bell rings before a dog barks"}
    assert perturb_text.swap_event(TWO, "a door slams", 0, 0) is None


@pytest.mark.parametrize("caption", ["a dog barks", "", "A dog.", "then a dog barks"])
def test_one_event_has_nothing_to_perturb(caption):
    assert perturb_text.reorder_events(caption, 0, 0) is None
    assert perturb_text.drop_event(caption, 0, 0) is None
    assert perturb_text.swap_event(caption, THREE, 0, 0) is None


def test_all_are_functions_of_seed_and_key():
    for make in (
        lambda seed, key: perturb_text.reorder_events("a, b, c, d, e, f, g, h", seed, key),
        lambda seed, key: perturb_text.drop_event(", ".join(map(str, range(500))), seed, key),
        lambda seed, key: perturb_text.swap_event(", ".join(map(str, range(500))), "a, b, c", seed, key),
        lambda seed, key: perturb_text.wrong_object("a dog", [f"word{n}" for n in range(500)] + ["dog"], seed, key),
    ):
        assert make(0, "a") == make(0, "a")
        assert len({make(*each) for each in ((0, "a"), (1, "a"), (0, "b"), (0, 7))}) == 4


def test_a_wrong_object_keeps_case_and_article():
    animals = ["dog", "owl", "hour glass"]
    assert set(many(lambda key: perturb_text.wrong_object("A dog and a DOG. Dogs? dog!", animals, 0, key))) == {
        "An owl and an OWL. Dogs? owl!",
        "An hour glass and an HOUR GLASS. Dogs? hour glass!",
    }
    assert perturb_text.wrong_object("An owl", ["owl", "unicorn"], 0, 0) == "A unicorn"
    assert perturb_text.wrong_object("a big owl", ["owl", "dog"], 0, 0) == "a big dog"
    assert perturb_text.wrong_object("a dogma", animals, 0, 0) is None
    assert perturb_text.wrong_object("a dog and an owl", ["Dog", "owl"], 0, 0) is None
    assert perturb_text.wrong_object("An hour glass", animals, 0, 1) in ("A dog", "An owl")
