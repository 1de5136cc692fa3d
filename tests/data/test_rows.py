import json
import pickle

import pyarrow as pa
import pytest

from mmalign.data.rows import Beside, Lines, Table, read_csv
from mmalign.records import UserError


def test_lines_are_found_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc3\xa4"}\n{"a": 3}')
    rows = pickle.loads(pickle.dumps(Lines(path)))
    assert [rows[n]["a"] for n in range(3)] == [row["a"] for row in rows.scan()] == [1, "ä", 3]
    assert rows.numbers.tolist() == [1, 3, 4]
    assert len(rows) == 3


@pytest.mark.parametrize("indent", [None, 2])
def test_the_objects_of_a_list_are_found_again(tmp_path, indent):
    values = [{"a": "ä]", "b": [1, {"c": "}"}]}, {"a": 2}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=indent), encoding="utf-8")
    rows = Lines(path)
    assert list(rows.scan()) == [rows[0], rows[1]] == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "is no list of objects"),
        ('[{"a": 1}, {"a"', "row 1: is not JSON"),
        ('[{"a": 1}', "row 1: is not JSON"),
        ("", "is no list of objects"),
    ],
)
def test_damaged_lists_are_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Lines(tmp_path / "a.json")


def test_files_beside_a_listing_and_never_outside(tmp_path):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.png").touch()
    (tmp_path / "b.png").touch()
    (folder / "link.png").symlink_to(tmp_path / "b.png")
    beside = Beside(folder, ("train",))
    assert beside("a.png") == folder / "train" / "a.png"
    for name in ("../b.png", "link.png", str(tmp_path / "b.png"), "train/../../b.png"):
        with pytest.raises(UserError, match="lies outside the folder"):
            beside(name)
    with pytest.raises(UserError, match=r"field image: there is no file 'c\.png'") as error:
        beside("c.png", "image")
    assert error.value.reason == "missing_file"


def test_csv_rows_keep_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,n\n"two\nlines",1\nshort\nlast,3\nlong,4,5\n')
    rows = read_csv(path)
    assert rows.numbers.tolist() == [3, 4, 5, 6]
    assert (rows[0], rows[2]) == ({"prompt": "two\nlines", "n": "1"}, {"prompt": "last", "n": "3"})
    for uneven in (rows[1], rows[3]):
        assert isinstance(uneven, UserError)
        assert str(uneven).startswith("has not 2 values")


def test_a_tables_scan_leaves_media_where_they_are():
    media = [[{"bytes": b"x", "path": None}], None]
    rows = Table("t", pa.table({"prompt": ["p", "q"], "media": media, "jpg": [b"1", b"2"], "n": [1, 2]}))
    assert list(rows.scan()) == [{"prompt": "p", "n": 1}, {"prompt": "q", "n": 2}]
    assert rows[0]["media"] == media[0]


def test_a_tables_row_that_is_not_utf8_is_one_error():
    prompts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    first, second, third = Table("t", pa.table({"prompt": prompts})).scan()
    assert (first, third) == ({"prompt": "a"}, {"prompt": "c"})
    assert second.reason == "not_utf8"
