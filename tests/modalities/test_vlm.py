"""Qwen2-VL on a tiny model: the interface that was made for diffusion holds for a model of tokens."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import mmalign
from mmalign.modalities import Encoded
from mmalign.modalities.adapter_files import ADAPTER_FILE
from mmalign.objectives import SFT, DiffusionDPO
from mmalign.records import Comparison, Text, UserError
from mmalign.surrogate import AnswerTokens, Keys, evaluate
from mmalign.surrogate.draws import generator
from mmalign.training import memory
from mmalign.training.loop import train
from mmalign.training.run import Run
from mmalign.training.views import WeightViews
from tests.conftest import picture
from tests.tiny import tiny_vlm

LN_2 = 0.6931471805599453


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vlm(tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture(scope="module")
def answers():
    """Pairs with one picture, with two, with none; a list of three."""
    questions = ["What is it?", "Which of these two is the fox, and why?", "Hm", "Count."]
    shown = [(picture(1),), (picture(2, (60, 30)), picture(3)), None, (picture(4, (28, 90)),)]
    texts = [
        ("A red fox.", "no"),
        ("The first: it is red", "Neither one is"),
        ("yes", "one two three"),
        ("1", "2", "3"),
    ]
    return [
        Comparison(
            id=f"answers {n}",
            prompt=questions[n],
            media=tuple(map(Text, texts[n])),
            score=tuple(range(len(texts[n]), 0, -1)),
            condition=shown[n],
        )
        for n in range(4)
    ]


def load(folder, **settings):
    return mmalign.load(folder, dtype=torch.float64, **settings)


def add_lora(modality):
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=6, target_modules=modality.lora_targets(), init_lora_weights=False)
    modality.network.add_adapter(config, "policy")
    return modality


def probe_of(encoded):
    nothing = torch.zeros(len(encoded), dtype=torch.int64)
    return AnswerTokens()(encoded.x0, encoded.cond, Keys(0, nothing, nothing, nothing), None)


def logp(modality, encoded, use=None):
    probe = probe_of(encoded)
    with torch.no_grad(), use or nullcontext():
        return probe.logp(modality.predict(probe, "policy"))


def bare(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    return model, AutoProcessor.from_pretrained(folder)


def conversation(item, answer, processor):
    """The processor's own reading of the whole conversation, unpadded."""
    content = [*({"type": "image"} for _ in item.condition or ()), {"type": "text", "text": item.prompt}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    text = processor.apply_chat_template(turns, tokenize=False)
    shown = {"images": [list(item.condition)]} if item.condition else {}
    return processor(text=[text], return_tensors="pt", **shown)


def test_logp_is_what_the_bare_model_gives(folder, answers):
    modality, (model, processor) = load(folder), bare(folder)
    item = answers[1]
    inputs = conversation(item, item.media[0], processor)
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = inputs["input_ids"][0, :-1]  # the line break after the end of the turn is no answer
    answer = len(item.media[0]) + 1  # a token a letter, and the end of the turn
    assert processor.tokenizer.decode(ids[-answer:]) == item.media[0] + "<|im_end|>"
    expected = sum(logits[0, at - 1].log_softmax(-1)[ids[at]] for at in range(len(ids) - answer, len(ids)))
    encoded = modality.encode([replace(item, media=item.media[:1], score=(1,))])
    assert encoded.x0[0].tolist() == ids.tolist()
    assert encoded.cond["answer_mask"].sum() == answer
    assert (encoded.x0 == model.config.image_token_id).sum() > 2  # placeholders were expanded
    assert logp(modality, encoded).item() == pytest.approx(expected.item(), rel=1e-12)
    probe = probe_of(encoded)
    assert modality.predict(probe, "policy").shape == (1, answer + 1, len(processor.tokenizer))


def test_padding_and_batch_mates_do_not_matter(folder, answers):
    modality = load(folder)
    whole = modality.encode(answers)
    assert len(whole) == 9
    assert (whole.cond["attention_mask"].sum(1).unique().numel()) > 4
    together = logp(modality, whole)
    assert together.std() > 1
    alone = [replace(item, media=(one,), score=(1,)) for item in answers for one in item.media]
    each = torch.cat([logp(modality, modality.encode([item])) for item in alone])
    assert torch.allclose(together, each, rtol=1e-10)
    joined = Encoded.cat([modality.encode([item]) for item in answers])
    assert torch.equal(joined.x0, whole.x0)
    rows = torch.tensor([7, 4, 0])
    probe = probe_of(joined)[rows]
    with torch.no_grad():
        assert torch.allclose(probe.logp(modality.predict(probe, "policy")), each[rows], rtol=1e-10)


def test_adapters_off_is_the_base_bit_for_bit_and_views_come_back(folder, answers):
    base, modality = load(folder), add_lora(load(folder))
    encoded, views = modality.encode(answers), WeightViews(modality)
    with_lora = logp(modality, encoded)
    assert torch.equal(logp(modality, encoded, views("reference")), logp(base, encoded))
    assert not torch.equal(with_lora, logp(base, encoded))
    assert torch.equal(logp(modality, encoded), with_lora)
    asked = evaluate(modality, probe_of(encoded), ("reference",), use=views).logp
    assert asked["policy"].requires_grad
    assert torch.equal(asked["reference"], logp(base, encoded))
    trained = [name for name, parameter in modality.network.named_parameters() if ".policy." in name]
    assert len(trained) == 2 * 4 * 2
    assert all(".language_model." in name for name in trained)


# --- training ---


@pytest.fixture
def recipe(folder, tmp_path):
    return Run(
        pretrained_model_name_or_path=str(folder),
        dataset_name="answers",
        output_dir=str(tmp_path / "run"),
        objective=DiffusionDPO(beta=0.1),
        max_train_steps=2,
        learning_rate=1e-2,
        train_batch_size=4,
        rank=2,
        seed=7,
    )


def run_it(recipe, comparisons, **changes):
    run = replace(recipe, **changes)
    modality = load(run.pretrained_model_name_or_path, lora=run.lora)
    output = train(run, modality=modality, comparisons=comparisons, say=lambda line: None)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], output, modality


def curve(rows, name="loss"):
    return [row[name] for row in rows]


def test_two_steps_of_dpo_raise_the_margin_and_plain_peft_loads_the_result(recipe, folder, answers):
    rows, output, modality = run_it(recipe, answers, validation_prompts=("Hm",))
    said = json.loads((output / "validation" / "step-000002.json").read_text())
    assert said["prompt"] == ["Hm"]
    assert said["base"] != said["policy"]
    assert "PeftModel.from_pretrained(" in (output / "README.md").read_text()
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-15)
    assert rows[0]["margin"] == 0
    assert rows[1]["loss"] < LN_2
    assert rows[1]["margin"] > 0
    assert {"adapter_config.json", ADAPTER_FILE, "README.md"} <= {path.name for path in output.iterdir()}
    encoded = modality.encode(answers)
    ours = logp(modality, encoded)

    from peft import PeftModel

    model, processor = bare(folder)
    inputs = conversation(answers[1], answers[1].media[0], processor)
    with torch.no_grad():
        base = model(**inputs).logits
        theirs = PeftModel.from_pretrained(model, output)(**inputs).logits
        probe = probe_of(modality.encode([replace(answers[1], media=answers[1].media[:1], score=(1,))]))
        logits = modality.predict(probe, "policy")
    assert not torch.equal(base, theirs)
    assert torch.equal(theirs[:, -1 - logits.shape[1] : -1], logits) or torch.allclose(
        theirs[:, -1 - logits.shape[1] : -1], logits, rtol=1e-12, atol=1e-14
    )
    # Our own loading, and a run that starts from the adapter: it is then the reference
    assert torch.equal(logp(load(folder, lora=output), encoded), ours)
    more, _, _ = run_it(recipe, answers, lora=str(output), output_dir=str(output / "more"), max_train_steps=1)
    assert more[0]["loss"] == pytest.approx(LN_2, rel=1e-15)


@pytest.mark.parametrize(
    "changes",
    [
        {"backward": "two-pass", "rows_at_once": 1},
        {"train_batch_size": 1, "gradient_accumulation_steps": 4, "cache_latents": True},
        {"backward": "two-pass", "rows_at_once": 4, "cache_latents": True},
        {"gradient_checkpointing": True, "dataloader_num_workers": 2},
    ],
    ids=str,
)
def test_how_a_step_is_cut_does_not_matter(recipe, answers, changes, tmp_path):
    expected, _, _ = run_it(recipe, answers)
    rows, _, _ = run_it(recipe, answers, output_dir=str(tmp_path / "other"), **changes)
    assert curve(rows) == pytest.approx(curve(expected), rel=1e-9)
    assert curve(rows, "grad_norm") == pytest.approx(curve(expected, "grad_norm"), rel=1e-6)


def test_resumed_is_uninterrupted(recipe, answers, tmp_path):
    expected, whole, _ = run_it(recipe, answers, max_train_steps=3, train_batch_size=2)
    part = {"output_dir": str(tmp_path / "part"), "train_batch_size": 2, "checkpointing_steps": 1}
    run_it(recipe, answers, max_train_steps=1, **part)
    rows, output, _ = run_it(recipe, answers, max_train_steps=3, **part, resume_from_checkpoint="latest")
    assert curve(rows) == curve(expected)
    ours, theirs = (load_file(path / ADAPTER_FILE) for path in (output, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_full_fine_tune_saves_a_model_with_its_processor(recipe, folder, answers):
    rows, output, modality = run_it(recipe, answers, use_lora=False, learning_rate=1e-3)
    assert rows[0]["loss"] == pytest.approx(LN_2, rel=1e-15)
    assert rows[1]["margin"] > 0
    assert "\nlibrary_name: transformers\n" in (output / "README.md").read_text()
    encoded = load(output).encode(answers)
    assert torch.equal(logp(load(output), encoded), logp(modality, encoded))
    assert not torch.equal(logp(load(folder), encoded), logp(modality, encoded))


def test_what_only_diffusion_has_is_said_in_a_sentence(recipe, answers, pairs):
    for changes, message in {
        "proportion_empty_prompts": (0.5, "a token model has no empty prompt"),
        "resolution": (512, "processor sizes pictures"),
    }.items():
        with pytest.raises(UserError, match=rf"(?i){message[1]}"):
            run_it(recipe, answers, **{changes: message[0]})
    with pytest.raises(UserError, match="medium 0 is no text"):
        run_it(recipe, pairs[:4])
    with pytest.raises(UserError, match="has no VAE"):
        load(recipe.pretrained_model_name_or_path, vae="some/vae")
    rows, _, _ = run_it(recipe, answers, objective=SFT(), max_train_steps=1)
    assert "chosen_logp" in rows[0]


def test_the_memory_plan_counts_what_autograd_keeps(recipe, folder, answers):
    run = replace(recipe, gradient_checkpointing=False)
    skeleton = mmalign.skeleton(folder)
    trained, planned = memory.measured(skeleton, run, samples=2, dtype=torch.float32)
    from mmalign.training.prepare import prepare_policy

    modality = mmalign.load(folder)
    prepare_policy(modality, run)
    inputs = skeleton.example(2, None, torch.float32)
    with memory.Saved(modality.network) as kept:
        modality.network(**inputs)
    assert trained == sum(p.numel() for p in modality.network.parameters() if p.requires_grad)
    assert planned == pytest.approx(kept.bytes, rel=0.1)
    less = memory.measured(skeleton, replace(run, gradient_checkpointing=True), samples=2, dtype=torch.float32)[1]
    assert less < planned


# --- generation ---


def test_an_answer_is_a_function_of_its_own_seed_and_prompt(folder, answers):
    modality = load(folder)
    prompts, images = [item.prompt for item in answers], [item.condition or () for item in answers]
    made = modality.generate(prompts, seeds=range(4), images=images, max_new_tokens=6)
    assert all(isinstance(answer, Text) for answer in made)
    torch.manual_seed(123)
    backwards = modality.generate(prompts[::-1], seeds=range(4)[::-1], images=images[::-1], max_new_tokens=6)
    assert backwards[::-1] == made
    assert modality.generate(prompts, seeds=range(4, 8), images=images, max_new_tokens=6) != made
    with pytest.raises(ValueError, match="4 prompts, 1 seeds"):
        modality.generate(prompts, seeds=[0])


def test_every_token_is_the_bare_models_sample_whatever_settings_the_folder_has(folder, answers):
    modality, (model, processor) = load(folder), bare(folder)
    assert model.generation_config.repetition_penalty > 1
    item = answers[1]
    inputs = conversation(item, "", processor)
    inputs = {
        name: value[:, :-2] if value.shape == inputs["input_ids"].shape else value for name, value in inputs.items()
    }
    new = []
    while len(new) < 12:
        with torch.no_grad():
            scores = model(**inputs, use_cache=False).logits[0, -1]
        noise = generator("answer", 5, inputs["input_ids"].shape[1]).gumbel(size=len(scores))
        new.append(int((scores / 0.7 + torch.from_numpy(noise)).argmax()))
        along = {"input_ids": new[-1], "attention_mask": 1, "mm_token_type_ids": 0}
        inputs |= {name: torch.cat([inputs[name], torch.tensor([[value]])], 1) for name, value in along.items()}
    settings = {"seeds": [5], "images": [item.condition], "max_new_tokens": 12, "temperature": 0.7}
    assert modality.generate([item.prompt], **settings) == [processor.tokenizer.decode(new, skip_special_tokens=True)]


def test_samples_follow_the_models_distribution_and_temperature_0_takes_the_likeliest(folder):
    modality, (model, processor) = load(folder), bare(folder)
    item = Comparison("x", "Hm", (Text(""),), (1,))
    inputs = conversation(item, "", processor)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -3] / 0.3  # before the end of the turn and the line break
    (greedy,) = modality.generate(["Hm"], seeds=[0], max_new_tokens=1, temperature=0)
    assert greedy == processor.tokenizer.decode(logits.argmax(), skip_special_tokens=True)
    made = modality.generate(["Hm"] * 200, seeds=range(200), max_new_tokens=1, temperature=0.3)
    same = torch.tensor([processor.tokenizer.decode(i, skip_special_tokens=True) == greedy for i in range(len(logits))])
    assert made.count(greedy) / 200 == pytest.approx(logits.softmax(-1)[same].sum().item(), abs=0.1)


# --- what is wrong with it ---


def test_texts_with_control_tokens_and_pictures_for_text_are_refused(folder, answers):
    modality = load(folder)
    with pytest.raises(UserError, match=r"'answers 0': its text holds the special token <\|im_end\|>"):
        modality.encode([replace(answers[0], prompt="a<|im_end|>b")])
    with pytest.raises(UserError, match=r"answer 1: its text holds the special token <\|image_pad\|>"):
        modality.encode([replace(answers[0], media=(Text("a"), Text("<|image_pad|>")))])
    with pytest.raises(UserError, match=r"input picture 0: no such picture"):
        modality.encode([replace(answers[0], condition=("gone.png",))])


def test_adapters_that_do_not_fit_are_refused(folder, answers, tmp_path):
    with pytest.raises(UserError, match=f"has no {ADAPTER_FILE}"):
        load(folder, lora=tmp_path)
    add_lora(load(folder)).save(tmp_path)
    other = tiny_vlm(tmp_path / "wider", width=32)
    with pytest.raises(UserError, match="does not fit"):
        load(other, lora=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match="layers do not fit"):
        load(folder, lora=tmp_path)


def test_folders_without_a_family_or_chat_template_are_refused(folder, tmp_path):
    import shutil

    with pytest.raises(UserError, match=r"has no model_index\.json or config\.json"):
        load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(copy)
    config = json.loads((copy / "config.json").read_text())
    for architectures, message in ((["BertModel"], "a BertModel is not supported"), ([], "a model without")):
        (copy / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(UserError, match=message):
            load(copy)
