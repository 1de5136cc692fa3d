import threading

import pytest
import torch

from mmalign.personal import Choices, add_users
from mmalign.records import UserError


def told(number, chosen, rejected):
    """An encoder that has seen everything: the choice's embedding is what it is given."""
    return chosen - rejected


def choices_of(parts):
    choices = Choices()
    for part in parts:
        choices = choices.plus("", part, torch.zeros_like(part), told)
    return choices


def test_one_taste_is_stable_after_four_choices():
    taste = torch.tensor([1.0, -2.0, 0.5])
    assert [choices_of([taste] * count).stable for count in (1, 2, 3, 4)] == [False, False, False, True]
    torch.testing.assert_close(choices_of([taste] * 4).embedding, taste / taste.square().mean().sqrt())


def test_choices_without_a_common_taste_take_eleven():
    unrelated = torch.eye(12)
    for count in (4, 9, 10, 11):
        choices = choices_of(unrelated[:count])
        assert choices.cosine == pytest.approx(((count - 1) / count) ** 0.5)
        assert choices.stable == (count == 11)


def test_pictures_that_do_not_differ_say_nothing():
    with pytest.raises(UserError, match="do not differ"):
        choices_of([torch.zeros(3)])


def test_users_who_come_at_once_are_all_kept(tmp_path):
    file, facts = tmp_path / "users.safetensors", {"encoder": "one"}
    threads = [
        threading.Thread(target=add_users, args=(file, {f"user-{n}": torch.full((3,), float(n))}, facts))
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    users = add_users(file, {"last": torch.ones(3)}, facts, new=True)
    assert len(users.vectors) == 17
    assert all((users[f"user-{n}"] == n).all() for n in range(16))
    with pytest.raises(UserError, match="a user 'user-3' already"):
        add_users(file, {"user-3": torch.zeros(3)}, facts, new=True)
    with pytest.raises(UserError, match="another way"):
        add_users(file, {"x": torch.ones(3)}, {"encoder": "two"})
    with pytest.raises(UserError, match="another length"):
        add_users(file, {"x": torch.ones(4)}, facts)
