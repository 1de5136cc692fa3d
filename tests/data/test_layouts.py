"""Every layout on a file with exactly the columns that were published."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.data.fields import file_of, wins
from mmalign.data.importers import read_comparisons
from mmalign.data.layouts import layout_of
from mmalign.data.rows import Beside
from mmalign.records import Sound, Text, UserError, Video

pytestmark = pytest.mark.usefixtures("own_cache")


def picture(seed):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


# --- Pick-a-Pic and SmPO ---


def pick_a_pic(**columns):
    """Three rows with all the columns that Pick-a-Pic v2 has (v1 has the same)."""
    table = {
        "are_different": [True, True, True],
        "best_image_uid": ["a0", "b1", "c0"],
        "caption": ["p0", "p1", "p2"],
        "created_at": ["2023-01-01"] * 3,
        "has_label": [True] * 3,
        "image_0_uid": ["a0", "b0", "c0"],
        "image_0_url": ["https://example.org/0.png"] * 3,
        "image_1_uid": ["a1", "b1", "c1"],
        "image_1_url": ["https://example.org/1.png"] * 3,
        "jpg_0": [picture(n) for n in range(3)],
        "jpg_1": [picture(n + 10) for n in range(3)],
        "label_0": [1.0, 0.0, 0.5],
        "label_1": [0.0, 1.0, 0.5],
        "model_0": ["sdxl"] * 3,
        "model_1": ["dreamlike"] * 3,
        "ranking_id": [11, 12, 13],
        "user_id": [7, 8, 9],
        "num_example_per_prompt": [1] * 3,
        "__index_level_0__": [100, 101, 102],
    }
    return pa.table(table | columns)


def test_pick_a_pic_with_all_its_columns(tmp_path):
    pq.write_table(pick_a_pic(), tmp_path / "p.parquet")
    result = read_comparisons(tmp_path / "p.parquet")
    assert result.counts == {"read": 3, "kept": 2, "ties": 1, "no_label": 0, "repeated": 0}
    second = result.comparisons[1]
    assert (second.id, second.prompt, second.score, second.user) == ("12", "p1", (0.0, 1.0), "8")
    assert (second.source, second.media) == (("sdxl", "dreamlike"), (picture(1), picture(11)))


def test_smpo_scores_are_taken_and_peoples_label_kept(tmp_path):
    scored = {"ps_score_0": [[0.20], [0.21], [0.3]], "ps_score_1": [[0.25], [0.19], [0.1]], "ps_label_0": [0, 1, 1]}
    pq.write_table(pick_a_pic(**scored), tmp_path / "p.parquet")
    result = read_comparisons(tmp_path / "p.parquet")
    assert [item.score for item in result.comparisons] == [(0.2, 0.25), (0.21, 0.19)]
    assert [item.aspects["human"] for item in result.comparisons] == [(1.0, 0.0), (0.0, 1.0)]
    assert result.counts["ties"] == 1  # people's tie, whatever the scores say
    assert read_comparisons(tmp_path / "p.parquet", aspect="human").comparisons[0].score == (1.0, 0.0)


def test_pick_a_pic_rows_of_one_picture_are_identical(tmp_path):
    pq.write_table(pick_a_pic(image_1_uid=["a0", "b1", "c1"]), tmp_path / "p.parquet")
    result = read_comparisons(tmp_path / "p.parquet")
    assert result.counts["identical"] == 1
    assert [tuple(row) for row in result.left_out] == [(0, "11", "identical", ""), (2, "13", "tie", "")]
    assert result.comparisons.rows.tolist() == [1]


# --- HPDv2 ---


def test_hpdv2_train(tmp_path):
    rows = [
        {"human_preference": [0, 1], "prompt": "ein Bär", "file_path": ["a.jpg", "b.jpg"]},
        {"human_preference": [1, 0], "prompt": "q", "file_path": ["b.jpg", "gone.jpg"]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    files(tmp_path, "train/a.jpg", "train/b.jpg", "test/a.jpg")
    result = read_comparisons(tmp_path, strict=False)
    (item,) = result.comparisons
    assert (item.prompt, item.score, [path.read_text() for path in item.media]) == (
        "ein Bär",
        (0, 1),
        ["train/a.jpg", "train/b.jpg"],
    )
    assert (result.counts["missing_file"], result.left_out[0].row) == (1, 1)
    with pytest.raises(UserError, match=r"train\.json, row 1: field file_path: there is no file 'gone\.jpg'"):
        read_comparisons(tmp_path)


def test_hpdv2_test_ranks_become_wins(tmp_path):
    names = ["a.jpg", "b.jpg", "c.jpg"]
    votes = [{"rank": [1, 2, 3], "user_hash": "x"}, {"rank": [2, 1, 3], "user_hash": "y"}]
    rows = [{"prompt": "p", "image_path": names, "rank": [2, 1, 3], "raw_annotations": votes}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    files(tmp_path, *(f"test/{name}" for name in names))
    (item,) = read_comparisons(tmp_path / "test.json").comparisons
    assert item.score == (0.5, 1.0, 0.0)
    assert item.aspects["votes"] == (0.75, 0.75, 0.0)


# --- lists ---


def test_lists_like_syn_pics(tmp_path):
    images = [{"bytes": picture(n)} for n in range(3)]
    row = {"prompt": ["p", "q"], "images": [images, images], "phi": [[0.9, 0.1, 0.5], [0.5, 0.5, 0.5]]}
    pq.write_table(pa.table(row), tmp_path / "p.parquet")
    result = read_comparisons(tmp_path / "p.parquet")
    assert (result.comparisons[0].score, result.counts["ties"]) == ((0.9, 0.1, 0.5), 1)
    assert result.comparisons[0].media[1]["bytes"] == picture(1)

    files(tmp_path, "x.png", "y.png")
    line = {"caption": "p", "images": ["x.png", "y.png"], "scores": {"hps": [0.2, 0.3], "pick": [5, 4], "clip": [1, 2]}}
    (tmp_path / "lists.jsonl").write_text(json.dumps(line))
    (item,) = read_comparisons(tmp_path / "lists.jsonl").comparisons
    assert item.score == pytest.approx((1 / 3, 2 / 3))
    assert item.aspects["pick"] == (5, 4)
    assert read_comparisons(tmp_path / "lists.jsonl", aspect="pick").comparisons[0].score == (5, 4)


def test_wins_are_syn_pics_phi():
    assert wins([[3.0, 1.0, 2.0], [1.0, 1.0, 2.0]]) == (0.5, 0.0, 0.75)
    with pytest.raises(UserError, match="mend them"):
        wins([[1.0, float("nan")]])


def vision_prefer(path, *all_scores):
    images = [
        {"image_id": f"i{n}", "model": "sdxl", "guidance": 7.5, "scores": scores, "rationale": {"aesthetic": "nice"}}
        for n, scores in enumerate(all_scores)
    ]
    path.write_text(json.dumps({"prompt_id": "v1", "prompt": "p", "images": images}))
    files(path.parent, *(f"images/i{n}.png" for n in range(len(all_scores))))


def test_vision_prefer_scores_are_means_of_aspects(tmp_path):
    names = ("prompt_following", "aesthetic", "fidelity", "harmlessness")
    path = tmp_path / "v.jsonl"
    vision_prefer(path, *(dict(zip(names, scores, strict=True)) for scores in ((5, 4, 3, 5), (1, 2, 3, 5))))
    (item,) = read_comparisons(path).comparisons
    assert (item.id, item.score, item.source) == ("v1", (4.25, 2.75), ("sdxl", "sdxl"))
    assert item.aspects["aesthetic"] == (4, 2)
    assert item.media[1].name == "i1.png"
    with pytest.raises(UserError, match=r"ties 1"):
        read_comparisons(path, aspect="harmlessness")
    with pytest.raises(UserError, match="line 1: has no aspect 'beauty', but prompt_following, aesthetic"):
        read_comparisons(path, aspect="beauty")
    vision_prefer(path, {"aesthetic": 6}, {"aesthetic": 1})
    with pytest.raises(UserError, match=r"has \[6, 1\] for aesthetic; these must be numbers from 1 to 5"):
        read_comparisons(path)


# --- sounds and videos ---


def test_audio_alpaca_and_its_like(tmp_path):
    sound = {"bytes": b"RIFF\0\0\0\0WAVE", "path": "a.wav"}
    other = {"bytes": b"fLaC1234", "path": "b.flac"}
    table = {"prompt": ["rain"], "chosen": [sound], "rejected": [other], "strategy": ["x"]}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    (item,) = read_comparisons(tmp_path / "p.parquet").comparisons
    assert (item.media, item.score) == ((Sound(sound["bytes"]), Sound(other["bytes"])), (1.0, 0.0))

    files(tmp_path, "s/a.wav", "s/b.wav")
    (tmp_path / "t.csv").write_text("caption,chosen,rejected\nrain,s/a.wav,s/b.wav\nsnow,s/a.wav,s/a.wav\n")
    result = read_comparisons(tmp_path / "t.csv")
    assert result.comparisons[0].media == (Sound(tmp_path / "s/a.wav"), Sound(tmp_path / "s/b.wav"))
    assert result.left_out[0][::2] == (3, "identical")
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "rain", "chosen": "s/a.wav", "rejected": "s/b.wav"}))
    assert read_comparisons(tmp_path / "t.jsonl").comparisons[0].media == result.comparisons[0].media


def test_files_are_told_apart_by_their_beginning(tmp_path):
    beside = Beside(tmp_path)
    assert file_of(picture(0), beside) == picture(0)
    assert isinstance(file_of(b"RIFF\0\0\0\0WAVE", beside), Sound)
    assert isinstance(file_of(b"RIFF\0\0\0\0WEBP", beside), bytes)
    assert isinstance(file_of(b"\0\0\0\x18ftypmp42", beside), Video)


VIDEO_REWARD = ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B"]


def video_reward(path, *verdicts):
    files(path.parent, "a.mp4", "b.mp4")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(VIDEO_REWARD)
        writer.writerows(["a.mp4", "b.mp4", f"p{n}, a", *three, 8.0, 16, 24, 48] for n, three in enumerate(verdicts))


def test_video_reward(tmp_path):
    path = tmp_path / "v.csv"
    video_reward(path, ("A", "same", "A"), ("A", "B", "same"), ("B", "B", "A"))
    result = read_comparisons(path)
    first, second = result.comparisons
    assert (first.prompt, first.score) == ("p0, a", (2.5, 0.5))
    assert first.media == (Video(tmp_path / "a.mp4", 8.0), Video(tmp_path / "b.mp4", 24.0))
    assert first.aspects == {"VQ": (1.0, 0.0), "MQ": (0.5, 0.5), "TA": (1.0, 0.0)}
    assert (second.score, result.counts["ties"]) == ((1.0, 2.0), 1)
    assert read_comparisons(path, aspect="TA").comparisons[1].score == (1.0, 0.0)
    video_reward(path, ("A", "C", "A"))
    with pytest.raises(UserError, match=r"v\.csv, line 2: field MQ is 'C'; it must be A, B or same"):
        read_comparisons(path)


# --- folders of pairs ---


@pytest.mark.parametrize(("chosen", "rejected", "ending"), [("w", "l", ".txt"), ("chosen", "rejected", ".caption")])
def test_folders_of_pairs(tmp_path, chosen, rejected, ending):
    files(tmp_path, f"{chosen}/a.png", f"{rejected}/a.jpg", f"{chosen}/b.png", f"{rejected}/b.png", f"{chosen}/c.png")
    (tmp_path / chosen / f"a{ending}").write_text("ein Bär\n", encoding="utf-8")
    result = read_comparisons(tmp_path, strict=False)
    (item,) = result.comparisons
    assert (item.id, item.prompt, item.score) == ("a", "ein Bär", (1.0, 0.0))
    assert [path.read_text() for path in item.media] == [f"{chosen}/a.png", f"{rejected}/a.jpg"]
    assert result.counts["missing_file"] == 2
    with pytest.raises(UserError, match=r"row 1: 'b' has no caption"):
        read_comparisons(tmp_path)


# --- what is like several ---


def test_answers_that_are_no_files_are_text(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "yes.", "rejected": "no."}))
    assert read_comparisons(tmp_path / "t.jsonl").comparisons[0].media == (Text("yes."), Text("no."))


def test_an_unknown_layout_lists_the_known():
    with pytest.raises(UserError, match=r"x: has columns a, b; known are .*\(Pick-a-Pic, SmPO\).*\(TRL\)"):
        layout_of({"b": 1, "a": 2}, "x")
