"""Asking a vision-language model, on a tiny Qwen2-VL."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.media import Frames
from mmalign.records import UserError
from mmalign.scoring.chat import Chat
from tests.conftest import picture
from tests.tiny import tiny_video_vlm

VIDEO = [picture(n, (56, 28)) for n in range(4)]
CONTENTS = [
    ["What is it?", picture(1)],
    [picture(2, (60, 30)), picture(3), "Which of these two is the fox, and why?"],
    ["Hm"],
    [VIDEO, "How does it move?"],
    ["This one", picture(4, (28, 90)), "or that", picture(5), "and", VIDEO[:2]],
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat.load(tiny_video_vlm(tmp_path_factory.mktemp("vlm")), dtype=torch.float64)


def test_a_content_in_the_models_own_words(chat):
    """Written out by hand, one row at a time, through transformers alone."""
    processor = AutoProcessor.from_pretrained(chat.source)
    model = AutoModelForImageTextToText.from_pretrained(chat.source, dtype=torch.float64)
    shown = "<|vision_start|><|{}_pad|><|vision_end|>"
    text = f"<|im_start|>user\nThis one{shown.format('image')}or that{shown.format('image')}and{shown.format('video')}"
    text += "<|im_end|>\n<|im_start|>assistant\n"
    _, first, _, second, _, video = CONTENTS[4]
    batch = processor(text=[text], images=[first, second], videos=[video], return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits[:, -1]
        tokens = model.generate(**batch, do_sample=False, repetition_penalty=1.0, max_new_tokens=5)
    torch.testing.assert_close(chat.logits(CONTENTS[4:]).double(), expected, atol=1e-5, rtol=1e-5)
    answer = processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert chat.answer(CONTENTS[4:], 5) == [answer]


def test_neighbours_and_padding_change_nothing(chat):
    together = chat.logits(CONTENTS)
    assert together.dtype == torch.float32
    assert together.std(0).max() > 0.1  # the contents differ
    torch.testing.assert_close(together, torch.cat([chat.logits([one]) for one in CONTENTS]), atol=1e-5, rtol=1e-5)
    assert chat.answer(CONTENTS, 6) == [chat.answer([one], 6)[0] for one in CONTENTS]


def test_rows_are_padded_on_the_left_and_keep_all_of_their_pictures(chat):
    chat.processor.tokenizer.model_max_length = 8  # a tokenizer that would cut
    batch = chat.inputs(CONTENTS)
    chat.processor.tokenizer.model_max_length = 10**6
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert len(batch["image_grid_thw"]) == 5
    shown = (batch["input_ids"] == chat.model.config.image_token_id).sum()
    assert shown == batch["image_grid_thw"].prod(1).sum() // 4


def test_log_probabilities_are_those_of_one_answer_at_a_time(chat):
    answers = ["A red fox.", "no", "neither of the two", "y", "5"]
    together = chat.logp(CONTENTS, answers)
    for content, answer, row in zip(CONTENTS, answers, together, strict=True):
        assert len(row) == len(answer)  # a token a byte
        torch.testing.assert_close(row, chat.logp([content], [answer])[0], atol=1e-5, rtol=1e-5)
        first = chat.processor.tokenizer(answer).input_ids[0]
        torch.testing.assert_close(row[0], chat.logits([content]).log_softmax(-1)[0, first], atol=1e-5, rtol=1e-5)


def test_log_probabilities_add_up_to_one(chat):
    """Over every second token that may follow the first."""
    letters = [chr(n) for n in range(32, 127)]
    rows = chat.logp([["Hm"]] * len(letters), ["a" + letter for letter in letters])
    total = sum(row[1].exp() for row in rows)
    assert 0 < total < 1
    longer = chat.logp([["Hm"]], ["ab and more"])[0]
    torch.testing.assert_close(longer[:2], rows[letters.index("b")], atol=1e-5, rtol=1e-5)


def test_models_that_count_seconds_are_told_how_far_frames_are_apart(chat):
    from transformers import Qwen2_5_VLProcessor

    own = chat.processor
    processor = Qwen2_5_VLProcessor(own.image_processor, own.tokenizer, own.video_processor, own.chat_template)
    slow = Frames(VIDEO)
    slow.fps = 0.5
    batch = Chat(chat.model, processor).inputs([[slow, "a"]])
    assert batch["second_per_grid_ts"].tolist() == [4]  # two frames a step


def test_what_cannot_be_asked(chat, tmp_path):
    with pytest.raises(UserError, match=r"special token <\|im_end\|>"):
        chat.inputs([["a<|im_end|>"]])
    with pytest.raises(UserError, match="answer is empty"):
        chat.logp([["a"]], [""])
    with pytest.raises(UserError, match="cannot be loaded"):
        Chat.load(tmp_path / "none")
    folder = tiny_video_vlm(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        Chat.load(folder)
