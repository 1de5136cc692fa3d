"""mmalign generate as a user meets it: several models, more of it later, two processes, what is wrong."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmalign.cli import main
from mmalign.data.candidates import is_candidates, read_candidates
from mmalign.data.prompts import read_prompts
from mmalign.records import UserError, open_image
from tests.conftest import picture
from tests.test_cli import refused
from tests.tiny import tiny_vlm

FAST = ["--num-inference-steps", "2", "--guidance-scale", "1"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\na fox\nred\n", encoding="utf-8-sig")
    return file


def save_lora(folder, source, seed=0):
    """A LoRA of the tiny model that changes its pictures."""
    import torch
    from peft import LoraConfig

    import mmalign

    modality = mmalign.load(source)
    config = LoraConfig(r=2, target_modules=modality.lora_targets(), init_lora_weights=False)
    torch.manual_seed(seed)
    modality.network.add_adapter(config, adapter_name="policy")
    modality.save(folder)
    return folder


def test_base_and_lora_in_one_command_then_more(tmp_path, tiny_sdxl, prompts, capsys):
    lora = save_lora(tmp_path / "aligned", tiny_sdxl)
    made = tmp_path / "made"
    shared = ["--prompts", str(prompts), "--output-dir", str(made), "--num", "2", *FAST]
    main(["generate", f"base={tiny_sdxl}", f"{tiny_sdxl}+{lora}", *shared])
    said = capsys.readouterr().out
    assert f"Made 12 candidates of 3 prompts; 0 were there already. They are in {made}" in said
    assert f"next: mmalign score {made}" in said
    rows = {(one.prompt, one.model, one.seed): open_image(one.medium).tobytes() for one in read_candidates(made)}
    label = f"{tiny_sdxl.name}+aligned"
    assert {name for _, name, _ in rows} == {"base", label}
    assert all(rows[prompt, label, seed] != rows[prompt, "base", seed] for prompt, _, seed in rows)
    parameters = [one.parameters for one in read_candidates(made) if one.model == label]
    assert {"source", "weights", "lora", "lora_weights", "num_inference_steps"} <= set(parameters[0])
    assert str(tmp_path) not in json.dumps(parameters)
    prompts.write_text("new\na red fox\na fox\nred\n")
    main(["generate", f"base={tiny_sdxl}", *shared, "--num", "3"])
    assert "Made 6 candidates of 4 prompts; 6 were there already" in capsys.readouterr().out
    with_lora = ["generate", str(tiny_sdxl), *shared, "--lora", str(lora)]
    main(with_lora)
    assert "Made 2 candidates of 4 prompts; 6 were there already" in capsys.readouterr().out
    save_lora(lora, tiny_sdxl, seed=1)
    main(with_lora)  # the same name, but other weights
    assert "Made 8 candidates of 4 prompts; 0 were there already" in capsys.readouterr().out


def test_answers_to_pictures(tmp_path, capsys):
    picture(0, (28, 28)).save(tmp_path / "fox.png")
    (tmp_path / "p.csv").write_text("caption,images,user\nwhat?,fox.png,ann\nwhy?,,\n")
    model, made = tiny_vlm(tmp_path / "vlm"), tmp_path / "made"
    argv = ["generate", model, "--prompts", tmp_path / "p.csv", "--output-dir", made, "--max-new-tokens", "3"]
    main([str(word) for word in (*argv, "--num", "2", "--layout", "folder", "--temperature", "2")])
    rows = list(read_candidates(made))
    assert sorted((one.prompt, one.user, one.condition is None) for one in rows[:2] + rows[2:]) == sorted(
        [("what?", "ann", False)] * 2 + [("why?", None, True)] * 2, key=str
    )
    capsys.readouterr()  # what making the tiny model showed
    assert "takes no --height; its settings are --max-new-tokens, --temperature." in refused(
        capsys, *argv, "--height", "64"
    )


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path, tiny_sdxl, prompts):
    argv = ["generate", f"base={tiny_sdxl}", "--prompts", str(prompts), *FAST]  # torchrun would read --num as its own
    main([*argv, "--output-dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*launch, "-m", "mmalign", *argv, "--output-dir", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Made 12 candidates of 3 prompts") == 1
    assert done.stdout.count("Candidates of base: 6/6") == 1
    one, two = ({row.id: open_image(row.medium) for row in read_candidates(tmp_path / name)} for name in ("one", "two"))
    assert set(one) == set(two)
    for name, image in one.items():
        assert max(abs(a - b) for a, b in zip(image.tobytes(), two[name].tobytes(), strict=True)) <= 2


def test_what_is_wrong_is_one_sentence(tmp_path, tiny_sdxl, prompts, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(tiny_sdxl)
    assert "needs a model" in refused(capsys, "generate", "--prompts", prompts)
    assert "needs --prompts" in refused(capsys, "generate", model)
    assert "no such prompt file" in refused(capsys, "generate", model, "--prompts", "gone.txt")
    assert "there is no such split" in refused(capsys, "generate", model, "--prompts", "embedded:tst")
    assert "is no model; write [NAME=]SOURCE[+LORA]" in refused(capsys, "generate", "a=", "--prompts", prompts)
    assert "Two models are called" in refused(capsys, "generate", model, model, "--prompts", prompts)
    assert "no such folder or file" in refused(capsys, "generate", "/gone/model", "--prompts", prompts)
    assert "no such LoRA file" in refused(capsys, "generate", f"{model}+/gone/lora", "--prompts", prompts)
    assert "takes no --temperature" in refused(capsys, "generate", model, "--prompts", prompts, "--temperature", "1")
    assert "did you mean --num?" in refused(capsys, "generate", model, "--prompts", prompts, "--nun", "1")
    assert not is_candidates(tmp_path / "candidates")


def test_every_kind_of_prompt_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{"prompt": "a fox", "user": 7, "images": ["a.png"]}, {"caption": "ein Dachs ü"}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "p.json").write_text(json.dumps([rows[0], "ein Dachs ü"]))
    (tmp_path / "p.csv").write_text(
        'prompt,user,images\r\na fox,7,"[""a.png""]"\r\nein Dachs ü,,\r\n', encoding="utf-8"
    )
    table = {"caption": ["a fox", "ein Dachs ü"], "user": ["7", None], "images": [["a.png"], None], "other": [1, 2]}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        first, second = read_prompts(tmp_path / f"p.{ending}")
        assert (first.text, first.user, first.images) == ("a fox", "7", (tmp_path / "a.png",))
        assert (second.text, second.user, second.images) == ("ein Dachs ü", None, ())
        assert len(read_prompts(tmp_path / f"p.{ending}", limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", b"\n \n", "p.txt: has no prompts"),
        ("p.txt", b"a\nfu\xdfchs\n", "p.txt, line 2: is not UTF-8 text"),
        ("p.csv", b"a\nfu\xdfchs\n", "p.csv, line 2: is not UTF-8 text|has no column"),
        ("p.csv", b"text,b\n1,2\n", "p.csv: has no column prompt or caption; its columns are text, b"),
        ("p.csv", b"prompt,b\n,2\n", "p.csv, line 2, field prompt: is ''"),
        ("p.csv", b"", "p.csv: has no column prompt or caption; its columns are none"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl, line 2: has no prompt or caption"),
        ("p.jsonl", b'{"prompt": "a"\n', "p.jsonl, line 1: is not JSON"),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl, line 1, field prompt: is 3"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1, field prompt: has half a character"),
        ("p.jsonl", b'{"prompt": "a", "images": ["no.png"]}\n', "line 1, field images: there is no file 'no.png'"),
        ("p.jsonl", b'{"prompt": "a", "images": 3}\n', "line 1, field images: is 3"),
        ("p.json", b'{"prompt": "a"}', "p.json: is no list"),
        ("p.parquet", b"PAR", "p.parquet: is no parquet file that can be read"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_row(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_prompts(tmp_path / name)


def test_answers_about_pictures_are_compared(tmp_path, capsys):
    picture(0, (28, 28)).save(tmp_path / "fox.png")
    (tmp_path / "p.csv").write_text("caption,images\nwhat?,fox.png\nwhy?,\n")
    base, aligned = (tiny_vlm(tmp_path / name, seed) for seed, name in enumerate(("base", "aligned")))
    card = {"name": "likely", "about": "a", "family": "vlm", "judges": "text", "licence": "none"}
    card |= {"model": {"transformers": str(base)}, "score": {"formula": "likelihood"}, "preprocess": {}}
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "card.yaml").write_text(yaml.safe_dump(card | {"comparable_across_prompts": False}))
    argv = ["compare", base, aligned, "--prompts", tmp_path / "p.csv", "--max-new-tokens", "3"]
    capsys.readouterr()
    assert "makes answers, but embedded-hps judges image; give another --scorer." in refused(capsys, *argv)
    out = tmp_path / "out"
    main([str(word) for word in (*argv, "--scorer", tmp_path / "scorer", "--output-dir", out)])
    page = (out / "report.html").read_text()
    assert page.count("<blockquote>") == 4
    assert page.count('alt="shown: ') == 1
    assert page.count('alt="shown: what?"') == 1
