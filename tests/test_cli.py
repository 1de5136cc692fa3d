"""The command as a user meets it: what is wrong is one sentence with exit code 2, and nothing is written."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.cli import main
from mmalign.data.importers import write_comparisons
from mmalign.recipe import listed, load_recipe, with_flags
from mmalign.records import UserError

RECIPE = """
from mmalign.objectives import DiffusionDPO
from mmalign.training.run import Run

def recipe():
    return Run(
        pretrained_model_name_or_path={model!r}, dataset_name={data!r}, output_dir={output!r},
        objective=DiffusionDPO(beta=2000), max_train_steps=2, learning_rate=1e-3, rank=2, train_batch_size=2,
    )
"""


@pytest.fixture
def recipe(tmp_path, tiny_sdxl, pairs):
    """A recipe file on the tiny model and the twelve pairs."""
    write_comparisons(tmp_path / "data", pairs)
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.format(model=str(tiny_sdxl), data=str(tmp_path / "data"), output=str(tmp_path / "run")))
    return file


def refused(capsys, *argv):
    """Runs the command, which has to end with code 2; returns its one sentence."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("mmalign: ")
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def test_train_runs_resumes_and_compares(recipe, tmp_path, capsys):
    main(["train", str(recipe), "--max-train-steps", "1"])
    assert "Memory plan" in capsys.readouterr().out
    main(["train", str(recipe), "--resume-from-checkpoint", "latest"])
    out = capsys.readouterr().out
    assert "Resumed at step 1" in out
    assert "step 2/2" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\nred\n")
    model = load_recipe(str(recipe)).pretrained_model_name_or_path
    arguments = ["compare", model, str(tmp_path / "run"), "--prompts", str(prompts), "--num-inference-steps", "2"]
    main([*arguments, "--scorer", "embedded-clip", "--output-dir", str(tmp_path / "report")])
    assert "win rate" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").is_file()


def test_unknown_flag_names_the_nearest(recipe, tmp_path, capsys):
    said = refused(capsys, "train", recipe, "--learning-rat", "1e-4")
    assert "--learning-rat is no flag" in said
    assert "did you mean --learning-rate?" in said
    assert "--objective.beta" in refused(capsys, "train", recipe, "--objective.bta", "1")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("error")
def test_the_flags_are_those_of_the_signature():
    import inspect
    from dataclasses import is_dataclass

    import tyro

    from mmalign.cli import FLAGS, flags_of

    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.UseAppendAction, tyro.conf.OmitArgPrefixes)
    for name, function in FLAGS.items():
        fields = [f for f in inspect.signature(function).parameters.values() if f.default is not f.empty]
        groups = [vars(field.default) if is_dataclass(field.default) else [field.name] for field in fields]
        expected = {"--" + name.replace("_", "-") for group in groups for name in group}
        found = flags_of(function, config=config)
        assert expected | {"--help"} <= found, name
        assert {flag for flag in found if not flag.startswith("--no-")} <= expected | {"-h", "--help"}, name


def test_missing_folders_and_unknown_names(recipe, tmp_path, capsys):
    assert "no such folder" in refused(capsys, "train", recipe, "--pretrained-model-name-or-path", tmp_path / "nothing")
    assert str(tmp_path / "nodata") in refused(capsys, "train", recipe, "--dataset-name", tmp_path / "nodata")
    assert "did you mean sdxl_diffusion_dpo?" in refused(capsys, "train", "sdxl_difusion_dpo")
    assert "no command" in refused(capsys, "trane")
    assert "no such prompt file" in refused(capsys, "compare", "embedded", "x", "--prompts", tmp_path / "no.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe(:\n", "line 1 does not parse"),
        ("x = 1\n", "recipe"),
        ("def recipe():\n    return 3\n", "has to return a Run"),
        ("def recipe():\n    return 1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_recipe_that_is_none(text, message, tmp_path, capsys):
    file = tmp_path / "bad.py"
    file.write_text(text)
    said = refused(capsys, "train", file)
    assert message in said
    assert "bad.py" in said


def test_bad_data(recipe, tmp_path, capsys):
    unlabelled = tmp_path / "picks.parquet"
    pq.write_table(pa.table({"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"y"]}), unlabelled)
    said = refused(capsys, "train", recipe, "--dataset-name", unlabelled)
    assert "label_0" in said
    assert "picks.parquet" in said
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "comparisons.jsonl").write_text("")
    assert "empty" in refused(capsys, "train", recipe, "--dataset-name", tmp_path / "empty")
    picture = next(path for path in (tmp_path / "data").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:40])
    assert "cannot be decoded" in refused(capsys, "train", recipe, "--train-batch-size", "12")


def test_values_that_cannot_be(recipe, capsys):
    assert "max_train_steps is 0" in refused(capsys, "train", recipe, "--max-train-steps", "0")
    assert "beta is -1" in refused(capsys, "train", recipe, "--objective.beta", "-1")
    assert "no such method" in refused(capsys, "train", recipe, "--objective", "DPOO")


def test_another_runs_folder(recipe, tmp_path, capsys):
    main(["train", str(recipe), "--max-train-steps", "1"])
    before = sorted((tmp_path / "run").rglob("*"))
    assert "holds another run's checkpoints" in refused(capsys, "train", recipe)
    said = refused(capsys, "train", recipe, "--resume-from-checkpoint", "latest", "--seed", "5")
    assert "its seed differ" in said
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_every_field_is_a_flag_and_a_method_can_be_switched():
    run = load_recipe("embedded_diffusion_dpo")
    changed = with_flags(
        run, ["--objective.beta", "3", "--objective.loss-type", "ipo", "--seed", "4", "--no-use-lora"], prog="p"
    )
    assert (changed.objective.beta, changed.objective.loss_type) == (3, "ipo")
    assert (changed.seed, changed.use_lora) == (4, False)
    assert changed.learning_rate == run.learning_rate
    switched = with_flags(run, ["--objective", "SFT"], prog="p")
    assert type(switched.objective).__name__ == "SFT"
    back = with_flags(switched, ["--objective", "DiffusionDPO", "--objective.beta", "9"], prog="p")
    assert back.objective.beta == 9


def test_another_methods_beta_is_not_carried_over(capsys):
    switched = with_flags(load_recipe("embedded_diffusion_dpo"), ["--objective", "SFT"], prog="p")
    with pytest.raises((UserError, SystemExit)):
        with_flags(switched, ["--objective", "DiffusionDPO"], prog="p")


def test_recipes_are_listed_copied_and_loaded(tmp_path, monkeypatch, capsys):
    main(["recipes"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("sdxl_diffusion_dpo", "sd15_diffusion_dpo", "embedded_diffusion_dpo"))
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", "sdxl_diffusion_dpo"])
    assert load_recipe("sdxl_diffusion_dpo.py") == load_recipe("sdxl_diffusion_dpo")
    assert "exists already" in refused(capsys, "recipes", "copy", "sdxl_diffusion_dpo")
    for name in listed():
        assert load_recipe(name).max_train_steps > 0


def test_score_lists_what_it_could_not_read(tmp_path, capsys, pairs):
    pairs[0].media[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    main(["score", str(tmp_path), "--prompt", "a red fox", "--scorer", "embedded-clip", "--scorer", "embedded-hps"])
    assert "1 scored, 1 not scored" in capsys.readouterr().out
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[0] == "file,prompt,embedded-clip,embedded-hps,error"
    assert "cannot be decoded" in rows[2]
    assert "no prompt" in refused(capsys, "score", tmp_path)
    assert "did you mean 'embedded-hps'" in refused(
        capsys, "score", tmp_path, "--prompt", "x", "--scorer", "embedded-hp"
    )


def test_score_takes_what_a_shell_makes_of_a_star(tmp_path, capsys, pairs):
    files = [str(tmp_path / f"{n}.png") for n in range(3)]
    for file, medium in zip(files, [*pairs[0].media, pairs[1].media[0]], strict=True):
        medium.save(file)
    main(["score", *files, "--prompt", "a red fox", "--aspects"])
    assert "3 scored, 0 not scored" in capsys.readouterr().out
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert rows[0] == "file,prompt,embedded-hps,embedded-hps.finish,embedded-hps.alignment,error"
    assert [row.split(",")[0] for row in rows[1:]] == files
    assert "--output x.csv is one table, but 2 are asked for" in refused(
        capsys, "score", tmp_path, tmp_path, "--prompt", "x", "--output", "x.csv"
    )
    assert "score what?" in refused(capsys, "score")
    assert f"{files[0]}x.png: no such file" in refused(capsys, "score", files[0] + "x.png", files[1], "--prompt", "x")


def test_help_and_import_load_nothing_heavy():
    script = (
        "import sys, mmalign\nfrom mmalign.cli import main\nmain(['--help'])\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'gradio', 'peft', 'accelerate', 'open_clip', 'tyro'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout
    assert re.search(r"HEAVY \[\]", done.stdout)


def test_scorers_are_listed_and_told(capsys):
    main(["scorers"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert re.search(r"image\s+Apache-2.0\s+4\.\d MB\s+here\s+95\.7% pair accuracy", lines["embedded-hps"])
    assert re.search(r"986 M parameters\s+not here\s+83\.3% pair accuracy \(official\), HPDv2 test", lines["hpsv2"])
    main(["scorers", "embedded-hps"])
    said = capsys.readouterr().out
    assert "comparable across prompts no" in said
    assert "pair accuracy, oracle on embedded scenes" in said
    assert "did you mean 'pickscore'" in refused(capsys, "scorers", "pikscore")
