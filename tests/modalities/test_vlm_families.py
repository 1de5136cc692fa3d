"""Every family of vision-language models, on tiny models: the same numbers and texts as in plain transformers."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmalign
from mmalign.data.export import write_comparisons
from mmalign.media import frames_of, make_video
from mmalign.objectives import DiffusionDPO
from mmalign.records import Text, UserError
from mmalign.surrogate import AnswerTokens, Keys
from mmalign.training import memory
from mmalign.training.loop import train
from mmalign.training.run import Run
from tests.conftest import picture
from tests.tiny_vlm import FAMILIES, SETTINGS, VIDEO, comparisons

LN_2 = 0.6931471805599453
# What stands between the prompt and an answer, and after it
AROUND = {
    "LLaVA 1.5": (" ", "</s>"),
    "SmolVLM": (" ", "<end_of_utterance>"),
    "Idefics3": (" ", "<end_of_utterance>"),
    "Gemma 3": ("", "<end_of_turn>"),
}
NO_TEMPLATE = ("LLaVA 1.5", "LLaVA-OneVision")  # the published templates do not write an answer as it was trained


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: FAMILIES[name](tmp_path_factory.mktemp("family")))


@pytest.fixture(scope="module")
def families(folders):
    """Name -> (modality, plain model, plain processor), which tests leave as they are."""
    return cache(lambda name: (load(folders(name)), *bare(folders(name))))


def load(folder, **settings):
    return mmalign.load(folder, dtype=torch.float64, **settings)


def bare(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    return model, AutoProcessor.from_pretrained(folder)


def logp(modality, encoded):
    nothing = torch.zeros(len(encoded), dtype=torch.int64)
    probe = AnswerTokens()(encoded.x0, encoded.cond, Keys(0, nothing, nothing, nothing), None)
    with torch.no_grad():
        return probe.logp(modality.predict(probe, "policy"))


def asked(processor, item):
    kinds = ["video" if not hasattr(one, "size") else "image" for one in item.condition or ()]
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": item.prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def shown(items, modality):
    """The processor's arguments for what is shown, the videos' frames read as ours are."""
    pictures = [[one for one in item.condition or () if hasattr(one, "size")] for item in items]
    clips = [[one for one in item.condition or () if not hasattr(one, "size")] for item in items]
    given = {"images": pictures} if any(pictures) else {}
    if any(clips):
        frames = [[frames_of(one, modality.video_fps, most=modality.max_frames) for one in row] for row in clips]
        told = [
            {"total_num_frames": len(clip), "fps": clip.fps, "duration": len(clip) / clip.fps}
            | {"frames_indices": list(range(len(clip)))}
            for row in frames
            for clip in row
        ]
        given |= {"videos": frames, "video_metadata": told, "do_sample_frames": False}
    return given


def transformers_logp(name, modality, model, processor, items, side="right"):
    """[N] sums over answer tokens from one padded batch, and the same from the model's own loss."""
    lead, end = AROUND.get(name, ("", "<|im_end|>"))
    rows = [(item, answer) for item in items for answer in item.media]
    texts = [asked(processor, item) + lead + answer + end for item, answer in rows]
    starts_itself = {"add_special_tokens": False} if name == "Gemma 3" else {}
    batch = processor(
        text=texts,
        **shown([item for item, _ in rows], modality),
        padding=True,
        padding_side=side,
        return_tensors="pt",
        **starts_itself,
    ).to(torch.float64)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (_, answer) in enumerate(rows):
        places = batch["attention_mask"][row].nonzero().squeeze(1)[-(len(lead + answer) + 1) :]  # a token a letter
        labels[row, places] = batch["input_ids"][row, places]
    with torch.no_grad():
        out = model(**batch, labels=labels)
    chosen = labels[:, 1:].clamp(min=0)[..., None]
    each = out.logits[:, :-1].log_softmax(-1).gather(-1, chosen).squeeze(-1) * (labels[:, 1:] != -100)
    return each.sum(1), -out.loss * (labels != -100).sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_logp_is_transformers_own(name, families):
    modality, model, processor = families(name)
    items = comparisons(3)
    for part in ([items[0], items[1], items[3]], [items[2]], [items[1]]):  # one picture, two, one; none; two
        ours = logp(modality, modality.encode(part))
        assert ours.std() > 0.5
        theirs, total = transformers_logp(name, modality, model, processor, part)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)
        assert ours.sum().item() == pytest.approx(total.item(), abs=1e-4)  # a loss is float32 in some
        left, total = transformers_logp(name, modality, model, processor, part, side="left")
        assert torch.allclose(ours, left, rtol=0, atol=1e-5)  # other positions, whose rotations are float32
        assert ours.sum().item() == pytest.approx(total.item(), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_conversation_and_nothing_of_the_processor_is_lost(name, families):
    modality, _, processor = families(name)
    item = comparisons(1)[1]
    (piece,) = modality.encode_prompts([item])
    assert {*piece} <= {*processor.model_input_names}
    if name in NO_TEMPLATE:
        return
    turns = [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": item.prompt}]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": str(item.media[0])}]})
    # transformers' own way from a conversation to tokens
    given = {"processor_kwargs": {"images": list(item.condition)}}
    ids = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", **given)
    ours = modality.encode([item]).x0[0]
    assert ours.tolist() == ids["input_ids"][0, : len(ours)].tolist()
    assert len(ids["input_ids"][0]) - len(ours) <= 1  # a line break behind the turn


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_mates_do_not_matter_and_pieces_survive_a_file(name, families, tmp_path):
    (modality, *_), items = families(name), comparisons(2)
    together = logp(modality, modality.encode(items))
    each = torch.cat([logp(modality, modality.encode([item])) for item in items])
    assert torch.allclose(together, each, rtol=1e-9)
    pieces = [*modality.encode_prompts(items), *modality.encode_media([(item, k) for item in items for k in (0, 1)])]
    for number, piece in enumerate(pieces):
        save_file({key: value.contiguous() for key, value in piece.items()}, tmp_path / str(number))
    back = [load_file(tmp_path / str(number)) for number in range(len(pieces))]
    answers = [[back[4 + 2 * n], back[5 + 2 * n]] for n in range(4)]
    assert torch.equal(logp(modality, modality.assemble(back[:4], answers)), together)


# --- video ---


def clip(seed, count):
    """Half a second between frames."""
    return make_video([picture(seed + n, (32, 32)) for n in range(count)], 2)


@pytest.fixture(scope="module")
def watched():
    """One video, two of other lengths, a video after a picture, none."""
    shown = [(clip(1, 5),), (clip(20, 4), clip(30, 4)), (picture(9), clip(40, 3)), None]
    return [replace(item, condition=one) for item, one in zip(comparisons(2), shown, strict=True)]


@pytest.mark.parametrize("name", VIDEO)
def test_videos_are_shown_as_transformers_shows_them(name, families, watched, monkeypatch):
    modality, model, processor = families(name)
    items = [item for item in watched if name != "SmolVLM" or item is not watched[2]]
    together = logp(modality, modality.encode(items))
    each = torch.cat([transformers_logp(name, modality, model, processor, [item])[0] for item in items])
    assert torch.allclose(together, each, rtol=0, atol=1e-8)
    pieces = modality.encode_prompts(items)
    assert all(isinstance(value, torch.Tensor) for piece in pieces for value in piece.values())
    assert len(pieces[0]["input_ids"][0]) > len(pieces[-1]["input_ids"][0]) + 2
    # Frames are pictures at our rate; another rate, or fewer frames at most, show others
    frames = replace(items[0], condition=([*frames_of(items[0].condition[0], modality.video_fps)],))
    assert torch.equal(logp(modality, modality.encode([frames])), logp(modality, modality.encode([items[0]])))
    monkeypatch.setattr(modality, "max_frames", 2)
    assert len(modality.encode_prompts(items[:1])[0]["input_ids"][0]) <= len(pieces[0]["input_ids"][0])
    assert not torch.allclose(logp(modality, modality.encode([items[0]])), each[:2])


def test_seconds_stay_exact_in_half_precision(folders, watched):
    modality = mmalign.load(folders("Qwen2.5-VL"), dtype=torch.bfloat16)
    modality.video_fps = 1.7
    row = modality.encode(watched[:1])
    inputs = modality._inputs(row.x0, row.cond)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / 1.6] * 2, rel=1e-6)  # 4 frames of 2.5 seconds


@pytest.mark.parametrize("name", ["LLaVA 1.5", "Idefics3", "Gemma 3", "SmolVLM"])
def test_a_video_that_cannot_be_shown_is_one_sentence(name, families, watched):
    message = "takes one of the two at a time" if name == "SmolVLM" else "takes pictures alone"
    with pytest.raises(UserError, match=rf"comparison 'answers 2': .*{message}"):
        families(name)[0].encode(watched[2:3])


# --- training and generation ---


@pytest.fixture
def recipe(tmp_path):
    return Run(
        pretrained_model_name_or_path="",
        dataset_name="answers",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=0.1),
        max_train_steps=2,
        learning_rate=1e-2,
        train_batch_size=4,
        rank=2,
        seed=7,
        gradient_checkpointing=True,
    )


def run_it(recipe, folder, items, **changes):
    run = replace(recipe, pretrained_model_name_or_path=str(folder), **changes)
    modality = load(folder)
    output = train(run, modality=modality, comparisons=items, say=lambda line: None)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], output, modality


def said(name, modality, model, processor, items):
    """What plain transformers generates, token by likeliest token."""
    answers = []
    for item in items:
        starts_itself = {"add_special_tokens": False} if name == "Gemma 3" else {}
        text = asked(processor, item)
        batch = processor(text=[text], **shown([item], modality), return_tensors="pt", **starts_itself)
        tokens = model.generate(**batch.to(torch.float64), max_new_tokens=6, do_sample=False)
        new = tokens[0, batch["input_ids"].shape[1] :]
        answers.append(
            processor.tokenizer.decode(new, skip_special_tokens=True).removeprefix(AROUND.get(name, ("",))[0])
        )
    return answers


def generated(name, modality, items):
    settings = {"images": [item.condition or () for item in items], "temperature": 0.0, **SETTINGS[name]}
    return modality.generate([item.prompt for item in items], seeds=range(len(items)), **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_of_dpo_and_plain_peft_says_the_same(name, recipe, folders, families, watched):
    from peft import PeftModel

    items = comparisons(2)
    rows, output, modality = run_it(recipe, folders(name), items)
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-12)
    assert rows[1]["loss"] < LN_2
    assert rows[1]["margin"] > 0
    trained = [key for key, parameter in modality.network.named_parameters() if ".policy." in key]
    assert len(trained) == 2 * 4 * 2
    assert all(".language_model." in key or ".text_model." in key for key in trained)
    untouched, model, processor = families(name)
    asking = [*items, watched[0]] if name in VIDEO else items
    base = said(name, modality, model, processor, asking)
    peft = PeftModel.from_pretrained(bare(folders(name))[0], output)
    ours = generated(name, modality, asking)
    assert all(isinstance(answer, Text) for answer in ours)
    assert said(name, modality, peft, processor, asking) == ours
    assert generated(name, load(folders(name), lora=output), asking) == ours
    assert generated(name, untouched, asking) == base
    assert ours != base


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "Qwen2.5-VL"])
def test_training_from_a_cache_of_videos_is_training_live(name, recipe, folders, watched, tmp_path):
    write_comparisons(tmp_path / "data", watched)
    run = replace(recipe, pretrained_model_name_or_path=str(folders(name)), dataset_name=str(tmp_path / "data"))
    losses = []
    for changes in ({}, {"cache_dir": str(tmp_path / "cache"), "cache_reference": True, "draws_per_sample": 1}):
        output = train(replace(run, output_dir=str(tmp_path / f"run{len(losses)}"), **changes), say=lambda line: None)
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert losses[0][1] < LN_2 - 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_fine_tune_is_a_folder_of_plain_transformers(name, recipe, folders):
    items = comparisons(2)
    changes = {"use_lora": False, "learning_rate": 1e-3, "gradient_checkpointing": False}
    rows, output, modality = run_it(recipe, folders(name), items, **changes)
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-12)
    assert rows[1]["margin"] > 0
    model, processor = bare(output)
    assert said(name, modality, model, processor, items) == generated(name, modality, items)
    assert torch.equal(logp(load(output), modality.encode(items)), logp(modality, modality.encode(items)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_memory_plan_sees_every_family(name, recipe, folders, families):
    skeleton = mmalign.skeleton(folders(name))
    run = replace(recipe, pretrained_model_name_or_path=str(folders(name)), gradient_checkpointing=False)
    trained, planned = memory.measured(skeleton, run, samples=2, dtype=torch.float32)
    network = families(name)[0].network
    widths = [network.get_submodule(target) for target in skeleton.lora_targets if "." in target]
    if widths:  # named one by one where the vision tower has projections of the same name
        assert trained == sum(2 * (one.in_features + one.out_features) for one in widths)
    assert trained > 0
    less = memory.measured(skeleton, replace(run, gradient_checkpointing=True), samples=2, dtype=torch.float32)[1]
    assert 0 < less < planned


# --- what is wrong with it ---


@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_that_do_not_match_and_too_long_prompts_are_one_sentence(name, families, monkeypatch):
    modality, item = families(name)[0], comparisons(2)[1]
    token = modality.processor.image_token
    with pytest.raises(UserError, match=rf"'answers 1': its text holds the special token {token.replace('|', '.')}"):
        modality.encode([replace(item, prompt=f"What is {token}?")])
    with monkeypatch.context() as patch:
        patch.setattr(modality.processor, "chat_template", modality.processor.chat_template.replace(token, ""))
        with pytest.raises(UserError, match=r"'answers 1': .*chat template refuses it \(.*2 images.*\)\.$"):
            modality.encode([item])
    with pytest.raises(UserError, match=r"'answers 1': its prompt .* is \d+ tokens, but .* takes 1024"):
        modality.encode([replace(item, prompt="Hm " * 400)])
    with pytest.raises(UserError, match=r"A prompt of \d+ tokens with its answer is 1\d\d\d tokens, but .* takes 1024"):
        modality.encode([replace(item, media=(Text("a"), Text("b " * 480)))])


def test_a_processor_that_expands_another_number_is_one_sentence(folders, tmp_path):
    modality = load(folders("LLaVA 1.5"))
    modality.processor.vision_feature_select_strategy = "full"
    encoded = modality.encode(comparisons(2))
    with pytest.raises(UserError, match=r"its processor does not fit its network \(.*tokens: \d+, features: \d+"):
        logp(modality, encoded)


def test_a_missing_package_is_one_sentence(folders, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    folder = folders("SmolVLM")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(UserError, match=r"cannot be loaded .*pip install num2words"):
        load(folder)
