import numpy as np
import pytest
from PIL import Image

from mmalign.data.loader import Batches, decode
from mmalign.records import Comparison, Sound, Text, UserError, Video


def comparisons(count, medium=None):
    medium = medium or Image.new("RGB", (2, 2))
    return [Comparison(f"c{n}", f"prompt {n}", (medium, medium), (1.0, 0.0)) for n in range(count)]


def ids(batches, steps):
    return [[item.id for item in batches.batch(step)] for step in steps]


def flat(rows):
    return [name for row in rows for name in row]


def test_an_epoch_visits_everything_once_and_counts_visits():
    batches = Batches(comparisons(24), groups_per_batch=4, seed=3)
    names = {item.id for item in batches.comparisons}
    for epoch in range(3):
        steps = range(6 * epoch, 6 * epoch + 6)
        assert set(flat(ids(batches, steps))) == names
        assert {draw for step in steps for draw in batches.draws(step)} == {epoch}
    assert ids(batches, range(6)) != ids(batches, range(6, 12))
    assert ids(batches, range(6)) != ids(Batches(batches.comparisons, groups_per_batch=4, seed=4), range(6))


def test_order_is_the_same_on_every_machine():
    order = Batches(comparisons(8), groups_per_batch=1, seed=0).order(0)
    assert order.tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(("world_size", "groups_per_batch"), [(2, 2), (4, 1), (1, 4)])
def test_ranks_and_accumulation_share_one_order(world_size, groups_per_batch):
    data = comparisons(30)  # not a multiple of 4: batches cross the borders of epochs
    whole = flat(ids(Batches(data, groups_per_batch=1, seed=1), range(96)))
    ranks = [
        Batches(data, groups_per_batch=groups_per_batch, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    dealt = [name for step in range(24) for rank in ranks for name in flat(ids(rank, [step]))]
    assert dealt == whole


@pytest.mark.parametrize("size", [17, 30, 101])
def test_a_batch_across_epochs_holds_nothing_twice(size):
    for seed in range(5):
        batches = Batches(comparisons(size), groups_per_batch=4, seed=seed)
        for row in ids(batches, range(3 * size)):
            assert len(set(row)) == 4


def test_a_tiny_set_gives_short_batches_rather_than_doubles():
    batches = Batches(comparisons(3), groups_per_batch=4, seed=0)
    for step in range(10):
        assert sorted(ids(batches, [step])[0]) == ["c0", "c1", "c2"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing_and_resume_is_a_step_number(num_workers):
    data = comparisons(10)
    plain = list(Batches(data, groups_per_batch=3, seed=0).iterate(0, 12))
    batches = Batches(data, groups_per_batch=3, seed=0, num_workers=num_workers)
    assert list(batches.iterate(0, 12)) == plain
    assert list(batches.iterate(7, 12)) == plain[7:]


def test_workers_prepare_and_their_errors_arrive():
    batches = Batches(comparisons(4), groups_per_batch=2, seed=0, num_workers=2)
    assert [row for row, _ in batches.iterate(0, 3, prepare=len)] == [2, 2, 2]
    broken = Batches(comparisons(4, medium=b"no picture"), groups_per_batch=2, seed=0, num_workers=2)
    with pytest.raises(UserError, match=r"comparison 'c\d', picture 0: cannot be decoded"):
        next(broken.iterate())


def test_decode_opens_pictures_and_keeps_the_rest(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(path)
    source = comparisons(1, medium=path)[0]
    result = decode([source])[0]
    assert result.media[1].getpixel((0, 0)) == (7, 7, 7)
    assert (result.id, result.group, result.score) == (source.id, source.group, source.score)


def test_decode_leaves_text_and_opens_what_is_shown(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2)).save(path)
    item = Comparison("c", "what?", (Text("a fox"), Text(str(path))), (1.0, 0.0), condition=(str(path),))
    (result,) = decode([item])
    assert result.media == item.media
    assert all(isinstance(medium, Text) for medium in result.media)
    assert result.condition[0].size == (3, 2)
    with pytest.raises(UserError, match=r"comparison 'c', input picture 0: no such picture"):
        decode([Comparison("c", "what?", (Text("a"),), (1.0,), condition=("gone.png",))])


def test_decode_leaves_sounds_and_videos():
    media = (Sound(b"RIFF", 16000), Video("a.mp4", 8.0))
    assert decode([Comparison("c", "p", media, (1.0, 0.0))])[0].media == media


def test_no_data_is_an_error():
    with pytest.raises(UserError, match="0 comparisons"):
        Batches([], groups_per_batch=1, seed=0)


def test_unshuffled_keeps_the_given_order():
    batches = Batches(comparisons(5), groups_per_batch=2, seed=0, shuffle=False)
    assert flat(ids(batches, range(3))) == ["c0", "c1", "c2", "c3", "c4", "c0"]
