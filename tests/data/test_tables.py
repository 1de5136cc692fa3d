import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.importers import read_comparisons
from mmalign.data.tables import read_table, share
from mmalign.records import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path):
    for shard in range(5):
        answers = [f"{shard}.{row}" for row in range(10)]
        table = {"prompt": answers, "chosen": answers, "rejected": ["no"] * 10}
        pq.write_table(pa.table(table), tmp_path / f"train-{shard:05}.parquet")
    return tmp_path


def test_share_of_rows():
    assert [share(30, None, part) for part in (0.1, 0.01, 1, None)] == [3, 1, 30, 30]
    assert (share(30, 2, 0.5), share(30, 20, 0.5)) == (2, 15)


@pytest.mark.parametrize(("wanted", "rows"), [({"limit": 12}, 12), ({"fraction": 0.23}, 12), ({"limit": 99}, 50)])
def test_the_first_rows_of_several_files(shards, wanted, rows):
    table = read_table(str(shards), "train", **wanted)
    assert table["prompt"].to_pylist() == [f"{n // 10}.{n % 10}" for n in range(rows)]


def test_first_rows_lie_on_the_disk_and_are_fetched_once(shards):
    before = pa.total_allocated_bytes()
    assert len(read_comparisons(shards, limit=15).comparisons) == 15
    for shard in (2, 3, 4):  # not even opened: what lies there is no parquet any more, yet as old and as large
        path = shards / f"train-{shard:05}.parquet"
        path.write_bytes(b"?" * path.stat().st_size)
    table = read_table(str(shards), "train", 14)
    assert (len(table), pa.total_allocated_bytes() - before < 100_000) == (14, True)
    assert len(read_table(str(shards), "train", 14)) == 14


@pytest.mark.parametrize("fraction", [0, -1, 1.5, float("nan")])
def test_a_fraction_is_above_0_and_at_most_1(shards, fraction):
    with pytest.raises(UserError, match=r"must be above 0 and at most 1"):
        read_comparisons(shards, fraction=fraction)


def test_fraction_of_lines(tmp_path):
    lines = [f'{{"prompt": "p", "chosen": "{n}", "rejected": "no"}}' for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_comparisons(tmp_path / "a.jsonl", fraction=0.25).counts["read"] == 3
    assert read_comparisons(tmp_path / "a.jsonl", fraction=0.25, limit=2).counts["read"] == 2


def test_saved_data_sets_with_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    part = Dataset.from_dict({"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]})
    DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(tmp_path / "d")
    assert len(read_table(str(tmp_path / "d"), "test")) == 1
    assert len(read_table(str(tmp_path / "d"), "train", 1)) == 1
    with pytest.raises(UserError, match="has no split 'dev', but test, train"):
        read_table(str(tmp_path / "d"), "dev")
