"""Text answers by the command alone, as a user has them: TRL's rows (images, prompt, chosen, rejected) and lists."""

import json
import re
from dataclasses import replace

import pytest
import torch

import mmalign
from mmalign.cli import main
from mmalign.data.importers import write_comparisons
from mmalign.data.users import Users, write_users
from mmalign.modalities.soft_tokens import told
from mmalign.recipe import load_recipe
from mmalign.records import Comparison, Text
from mmalign.training import memory
from mmalign.training.prepare import prepare_policy
from tests.conftest import picture
from tests.test_cli import refused
from tests.tiny import tiny_vlm

RECIPE = """
from mmalign.objectives import DiffusionDPO
from mmalign.surrogate import AnswerTokens
from mmalign.training.run import Run

def recipe():
    return Run(
        pretrained_model_name_or_path={model!r}, dataset_name={data!r}, output_dir={output!r},
        objective=DiffusionDPO(beta=0.1, draw=AnswerTokens()),
        max_train_steps=2, learning_rate=1e-2, rank=2, train_batch_size=2,
    )
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm(tmp_path_factory.mktemp("tiny_qwen"))


@pytest.fixture
def rows(tmp_path):
    """Six rows beside their pictures: with one, with two, with none."""
    for n in range(6):
        picture(n).save(tmp_path / f"{n}.png")
    shown = [["0.png"], ["1.png", "2.png"], [], ["3.png"], ["4.png"], ["5.png"]]
    return [
        {"images": images, "prompt": "What is it?", "chosen": f"a fox, {n}", "rejected": "no idea"}
        for n, images in enumerate(shown)
    ]


@pytest.fixture
def recipe(tmp_path, model):
    """(rows, or a data set) -> a recipe file on them."""

    def made(data):
        if isinstance(data, list):
            (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
            data = tmp_path / "answers.jsonl"
        file = tmp_path / "mine.py"
        file.write_text(RECIPE.format(model=str(model), data=str(data), output=str(tmp_path / "run")))
        return file

    return made


def test_rows_of_trl_train_and_the_margin_rises(recipe, rows, tmp_path, capsys):
    main(["train", str(recipe(rows)), "--train-batch-size", "6"])
    said = capsys.readouterr().out
    assert "6 kept" in said
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["margin"] == 0 < second["margin"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": ["gone.png"]}, r"line 2: .*gone\.png"),
        ({"chosen": None}, "line 2: field chosen is missing"),
        ({"rejected": 7}, "line 2: field rejected is missing or holds no text"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]},
            "turns user, user",
        ),
        ({"prompt": "<|im_end|> now"}, r"special token <\|im_end\|>"),
        ({"chosen": "here: <|image_pad|>"}, r"special token <\|image_pad\|>"),
    ],
    ids=str,
)
def test_a_wrong_row_is_one_sentence(recipe, rows, wrong, message, capsys):
    rows[1] |= wrong
    assert re.search(message, refused(capsys, "train", recipe(rows), "--train-batch-size", "6"))


def test_a_picture_that_cannot_be_decoded_is_one_sentence(recipe, rows, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    said = refused(capsys, "train", recipe(rows), "--train-batch-size", "6")
    assert "input picture 0" in said
    assert "cannot be decoded" in said


def lists(user=None):
    texts = [("a fox", "an animal", "no"), ("red", "blue", "I do"), ("one", "two", "three")]
    return [
        Comparison(f"list {n}", "Which?", tuple(map(Text, said)), (0.9, 0.6, 0.1), user=user, condition=(picture(n),))
        for n, said in enumerate(texts)
    ]


@pytest.mark.parametrize("method", ["SmPO", "RankDPO", "MMDPO"])
def test_scored_lists_train_by_one_flag(method, recipe, tmp_path, capsys):
    write_comparisons(tmp_path / "lists", lists())
    main(["train", str(recipe(tmp_path / "lists")), "--objective", method, "--objective.beta", "0.1"])
    capsys.readouterr()
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["objective"]["draw"] == "AnswerTokens()"
    assert "No module" not in capsys.readouterr().err


def test_users_train_soft_tokens_by_two_flags(recipe, tmp_path, capsys):
    write_comparisons(tmp_path / "lists", lists(user="ann"))
    write_users(tmp_path / "users.safetensors", Users({"ann": torch.ones(3)}))
    flags = ["--objective", "PPD", "--objective.beta", "0.1", "--users", str(tmp_path / "users.safetensors")]
    main(["train", str(recipe(tmp_path / "lists")), *flags, "--user-dropout", "0"])
    assert {"user_layers.safetensors", "users.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    margins = [json.loads(line)["margin"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert margins[0] == 0 != margins[1]
    capsys.readouterr()


def test_the_memory_plan_counts_what_soft_tokens_keep(model, tmp_path):
    write_users(tmp_path / "users.safetensors", Users({"ann": torch.ones(16)}))
    run = replace(load_recipe("qwen2_vl_dpo"), users=str(tmp_path / "users.safetensors"), gradient_checkpointing=False)
    skeleton = mmalign.skeleton(model)
    trained, planned = memory.measured(skeleton, run, samples=2, dtype=torch.float32)
    modality = mmalign.load(model)
    prepare_policy(modality, run)
    with memory.Saved(modality.network) as kept, told(modality.network, torch.ones(2, 16)):
        modality.network(**skeleton.example(2, None, torch.float32))
    assert trained == sum(p.numel() for p in modality.network.parameters() if p.requires_grad) == 16 * 4 * 16
    assert planned == pytest.approx(kept.bytes, rel=0.1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("MaPO", "MaPO compares denoising errors"),
        ("InPO", "InPO inverts a noising process"),
        ("SmPO", "score the data first"),
        ("RankDPO", "score the data first"),
        ("MMDPO", "score the data first"),
        ("PPD", "needs users"),
    ],
)
def test_a_method_that_has_no_meaning_here_says_why(recipe, rows, tmp_path, capsys, method, message):
    beta = [] if method == "MaPO" else ["--objective.beta", "0.1"]
    assert message in refused(capsys, "train", recipe(rows), "--objective", method, *beta)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["SmPO", "RankDPO"])
def test_a_draw_of_noise_says_what_to_give(recipe, tmp_path, capsys, method):
    write_comparisons(tmp_path / "lists", lists())
    file = recipe(tmp_path / "lists")
    file.write_text(file.read_text().replace(", draw=AnswerTokens()", ""))
    said = refused(capsys, "train", file, "--objective", method, "--objective.beta", "0.1")
    assert "in a recipe give draw=AnswerTokens()" in said


@pytest.mark.parametrize("draw", ["FreshNoise", "AnswerTokens"])
def test_a_draw_of_the_other_kind_of_model_is_refused(draw, recipe, rows, tmp_path, tiny_sdxl, model, pairs, capsys):
    file = recipe(rows)
    if draw == "AnswerTokens":
        write_comparisons(tmp_path / "pairs", pairs)
        text = file.read_text().replace(str(model), str(tiny_sdxl))
        file.write_text(text.replace(str(tmp_path / "answers.jsonl"), str(tmp_path / "pairs")))
    else:
        file.write_text(file.read_text().replace("AnswerTokens", "FreshNoise"))
    assert f"its draw is {draw}; a recipe gives token models AnswerTokens" in refused(capsys, "train", file)
