"""VideoReward and HPSv3, on tiny checkpoints in the official layouts, against models put together as officially."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from mmalign.media import frames_of
from mmalign.records import UserError
from mmalign.scoring import list_scorers, load_scorer
from mmalign.scoring.frames import fit, reader
from tests.conftest import picture
from tests.tiny import tiny_video_vlm

AXES = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
PROMPTS = ["a fox", "two foxes, side by side, {and} one"]
PIXELS = [4 * 28 * 28, 6 * 28 * 28]
VIDEOS = [[picture(10 * v + n, (60, 40)) for n in range(4 + 2 * v)] for v in range(2)]


class Official(Qwen2VLForConditionalGeneration):
    """The official forward under transformers 4.45: the decoder gets embeddings, and no position ids."""

    def rewards(self, batch, ids):
        embeds = self.model.language_model.embed_tokens(batch["input_ids"])
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in batch:
                seen = self.model.visual(batch[pixels], grid_thw=batch[f"{kind}_grid_thw"]).pooler_output
                mask = batch["input_ids"] == getattr(self.config, f"{kind}_token_id")
                embeds = embeds.masked_scatter(mask[..., None].expand_as(embeds), seen)
        hidden = self.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        return self.rm_head(hidden)[torch.isin(batch["input_ids"], torch.tensor(ids))]


def official(base, tokens, head):
    """Model with a head, and a processor that knows the tokens."""
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    model = Official.from_pretrained(base)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.rm_head = head
    for parameter in head.parameters():  # so that a small difference inside shows
        parameter.data *= 8
    return model.eval(), processor


def old_names(tensors, prefix=""):
    """As transformers 4.45 called them."""
    names = {f"{prefix}model.language_model.": f"{prefix}model.", f"{prefix}model.visual.": f"{prefix}visual."}
    for new, old in names.items():
        tensors = {name.replace(new, old) if name.startswith(new) else name: value for name, value in tensors.items()}
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def write(folder, facts, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "card.yaml").write_text(yaml.safe_dump(facts | {"family": "reward-vlm"} | changes))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_video_vlm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def hpsv3(base, tmp_path_factory):
    """Folder of a card, and the official scores [2, 2] of two pictures."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    model, processor = official(base, ["<|Reward|>"], head)
    folder = tmp_path_factory.mktemp("hpsv3")
    save_file(old_names(model.state_dict()), folder / "HPSv3.safetensors")
    question = "Rate it.\nTextual prompt - {text_prompt}\n: <|Reward|>\nEND\n"
    (folder / "question.txt").write_text(question)
    facts = {
        "name": "tiny",
        "model": {"transformers": str(base)},
        "weights": {"file": "HPSv3.safetensors"},
        "preprocess": {"pixels": PIXELS},
        "score": {
            "formula": "gaussian",
            "tokens": ["<|Reward|>"],
            "question": {"file": "question.txt", "source": "us"},
        },
    }
    rows = []
    for medium, prompt in zip(media(), PROMPTS, strict=True):
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        text += question.replace("{text_prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        batch = processor(text=[text], images=[fit(medium, PIXELS)], do_resize=False, return_tensors="pt")
        with torch.no_grad():
            rows.append(model.rewards(batch, processor.tokenizer.convert_tokens_to_ids(["<|Reward|>"]))[0])
    return write(folder, facts), torch.stack(rows), facts


def media():
    return [picture(1, (90, 40)), picture(2, (50, 77))]


def test_hpsv3_is_mu_and_sigma(hpsv3):
    folder, expected, _ = hpsv3
    scorer = load_scorer(folder)
    found = scorer.aspects(media(), PROMPTS)
    assert found.keys() == {"score", *scorer.parts} == {"score", "sigma"}
    assert scorer.dtype == "float32"
    torch.testing.assert_close(found["score"], expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["sigma"], expected[:, 1].exp(), atol=1e-5, rtol=1e-5)
    assert abs(expected[0, 0] - expected[1, 0]) > 1e-3


def test_batches_change_nothing_and_prompts_do(hpsv3):
    scorer = load_scorer(hpsv3[0])
    together = scorer.score(media(), PROMPTS)
    torch.testing.assert_close(together, scorer.score(media(), PROMPTS, batch_size=1), atol=1e-5, rtol=1e-5)
    assert (scorer.score(media(), PROMPTS[::-1]) - together).abs().min() > 1e-5


def test_positions_are_counted_and_not_laid_on_a_grid(hpsv3, monkeypatch):
    """Qwen2-VL's own positions give other numbers, so that the agreement above says something."""
    folder, expected, _ = hpsv3
    scorer = load_scorer(folder)
    forward = scorer.chat.model.forward
    monkeypatch.setattr(scorer.chat.model, "forward", lambda position_ids, **batch: forward(**batch))
    assert (scorer.score(media(), PROMPTS) - expected[:, 0]).abs().max() > 1e-3


def test_names_of_transformers_5_do_as_well(hpsv3, tmp_path):
    folder, expected, facts = hpsv3
    from safetensors.torch import load_file

    new = {}
    for name, value in load_file(folder / "HPSv3.safetensors").items():
        name = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        new[name] = value
    save_file(new, tmp_path / "HPSv3.safetensors")
    score = facts["score"] | {"question": (folder / "question.txt").read_text().replace("{text_prompt}", "{prompt}")}
    torch.testing.assert_close(
        load_scorer(write(tmp_path, facts, score=score)).score(media(), PROMPTS), expected[:, 0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_videoreward_is_three_normalised_axes_and_their_sum(base, tmp_path, outputs):
    torch.manual_seed(2)
    model, processor = official(base, AXES, nn.Linear(16, outputs, bias=False))
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        init_lora_weights=False,
        target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj",
    )
    wrapped = get_peft_model(model, config).eval()
    torch.save(old_names(wrapped.state_dict(), "base_model.model."), tmp_path / "model.pth")
    norm = {"VQ_mean": 0.3, "VQ_std": 2.0, "MQ_mean": -0.1, "MQ_std": 0.5, "TA_mean": 1.0, "TA_std": 3.0}
    told = {"inference_config": norm, "peft_lora_config": {"lora_r": 4, "lora_alpha": 12}}
    (tmp_path / "model_config.json").write_text(json.dumps(told))
    question = "Quality <|VQ_reward|> motion <|MQ_reward|> truth to {prompt}: <|TA_reward|>\nEND\n"
    frames = {"fps": 2, "multiple": 2, "least": 4, "ends": True}
    facts = {
        "name": "tiny",
        "judges": "video",
        "model": {"transformers": str(base), "config": {"file": "model_config.json"}},
        "weights": {"file": "model.pth"},
        "preprocess": {"frames": frames, "pixels": PIXELS},
        "score": {"formula": "axes", "axes": ["VQ", "MQ", "TA"], "tokens": AXES, "question": question},
    }
    scorer = load_scorer(write(tmp_path, facts))
    found = scorer.aspects(VIDEOS, PROMPTS)
    assert found.keys() == {"score", *scorer.parts}
    ids = processor.tokenizer.convert_tokens_to_ids(AXES)
    for row, (video, prompt) in enumerate(zip(VIDEOS, PROMPTS, strict=True)):
        text = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        text += question.replace("{prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
        shown = list(frames_of(video, **frames, each=lambda picture: fit(picture, PIXELS)))
        batch = processor(text=[text], videos=[shown], do_resize=False, return_tensors="pt")
        with torch.no_grad():
            raw = wrapped.base_model.model.rewards(batch, ids)  # [3 tokens, outputs]
        raw = raw.diagonal() if outputs == 3 else raw[:, 0]
        for value, axis in zip(raw, ("VQ", "MQ", "TA"), strict=True):
            expected = (value.item() - norm[f"{axis}_mean"]) / norm[f"{axis}_std"]
            assert found[axis][row].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(found["score"], found["VQ"] + found["MQ"] + found["TA"])
    assert found["VQ"].std() > 1e-4


def test_what_does_not_fit(hpsv3, tmp_path):
    folder, _, facts = hpsv3
    here = facts | {"weights": {"file": str(folder / "HPSv3.safetensors")}}
    here["score"] = facts["score"] | {"question": "a {prompt} <|Reward|>"}
    with pytest.raises(UserError, match=r"score\.formula must be gaussian"):
        load_scorer(write(tmp_path, here, score=here["score"] | {"formula": "sum"}))
    with pytest.raises(UserError, match="must hold each of"):
        load_scorer(write(tmp_path, here, score=here["score"] | {"question": "a {prompt}"}))
    with pytest.raises(UserError, match=r"question\.txt is missing"):
        load_scorer(write(tmp_path, facts | {"weights": here["weights"]}))
    with pytest.raises(UserError, match="cannot be had"):
        load_scorer(write(tmp_path, here, model={"transformers": "no/such"}))
    save_file({"model.embed_tokens.weight": torch.ones(264, 16)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="on one side only"):
        load_scorer(write(tmp_path, here, weights={"file": "part.safetensors"}))
    scorer = load_scorer(write(tmp_path, here))
    with pytest.raises(UserError, match="holds a special token of tiny"):
        scorer.score([picture(1)], ["a <|Reward|>"])


@pytest.mark.parametrize("card", [c for c in list_scorers() if c.family == "reward-vlm"], ids=lambda card: card.name)
def test_the_bundled_cards(card):
    assert reader(card)
    assert len(card.score["question"]["sha256"]) == 64
    assert len(card.score["tokens"]) == len(card.score.get("axes", [0]))
