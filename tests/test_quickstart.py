"""Quickstart, small: every file it promises is there and loads."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import mmalign
from mmalign import embedded
from mmalign.cli import main
from mmalign.embedded import listen, sounds
from mmalign.media import sound_of
from mmalign.quickstart import spread
from mmalign.tasks import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `mmalign quickstart --small` wrote."""
    folder = tmp_path_factory.mktemp("quickstart")
    main(["quickstart", "--small", "--output-dir", str(folder)])
    return folder


def test_it_writes_what_it_promises(folder):
    page = (folder / "report.html").read_text()
    assert "held out" in page
    assert "http://" not in page
    assert 'src="data:image' in page
    assert (folder / "grid.png").stat().st_size > 10_000
    aligned = folder / "aligned"
    assert len((aligned / "metrics.jsonl").read_text().splitlines()) == 4
    card = (aligned / "README.md").read_text()
    assert "win rate" in card
    assert "load_lora_weights" in card
    scores = json.loads((folder / "scores.json").read_text())
    assert [row["n"] for row in scores["rows"]] == [8, 8, 8]
    assert (folder / "pairs" / "comparisons.jsonl").is_file()


def test_its_lora_gives_the_same_pictures_in_plain_diffusers(folder):
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    ours = mmalign.load(embedded.path(), lora=folder / "aligned").generate(
        ["a fox on a blue background"], seeds=[5], **settings
    )
    plain = StableDiffusionXLPipeline.from_pretrained(embedded.path())
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(str(folder / "aligned"), weight_name="pytorch_lora_weights.safetensors")
    theirs = plain("a fox on a blue background", generator=torch.Generator().manual_seed(5), **settings).images
    assert np.array_equal(ours[0], theirs[0])


def test_sounds_can_be_heard_in_the_report(tmp_path):
    main(["quickstart", "--modality", "audio", "--small", "--output-dir", str(tmp_path)])
    assert (tmp_path / "report.html").read_text().count("<audio") == 2 * 8
    assert [row["n"] for row in json.loads((tmp_path / "scores.json").read_text())["rows"]] == [8] * 4
    assert (tmp_path / "aligned" / "adapter_model.safetensors").is_file()


def test_audio_pairs_are_true_sounds_against_ones_that_miss_or_exchange_events():
    pairs = TASKS["audio"].pairs(24, 0, "pairs")
    waves = [[torch.from_numpy(sound_of(sound, sounds.RATE)[0][0]) for sound in pair.media] for pair in pairs]
    asked = [sounds.events(pair.prompt) for pair in pairs]
    right, wrong = (listen.template_events(torch.stack(side)) for side in zip(*waves, strict=True))
    assert np.mean([heard == want for heard, want in zip(right, asked, strict=True)]) > 0.9
    assert np.mean([heard in sounds.wrong_ways(want) for heard, want in zip(wrong, asked, strict=True)]) > 0.9
    lacking = [len(heard) < len(want) for heard, want in zip(wrong, asked, strict=True)]
    assert 0.2 < np.mean(lacking) < 0.8
    assert {pair.prompt for pair in pairs} <= set(sounds.prompts("pairs"))
    assert {pair.score for pair in pairs} == {(1.0, 0.0)}


def test_a_second_run_does_not_overwrite_the_first(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", "--small", "--output-dir", str(folder)])
    assert ended.value.code == 2
    assert "holds another run's checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompts_of_pairs_development_and_report_are_disjoint_and_enough(task):
    counts = {"pairs": 48 if task.pairs else task.size.pair_prompts, "test": task.size.test_prompts, "development": 48}
    names = {split: {one.name for one in spread(task.asked(split), n, seed=0)} for split, n in counts.items()}
    assert {split: len(found) for split, found in names.items()} == counts
    assert (
        not names["pairs"] & names["test"]
        | names["pairs"] & names["development"]
        | names["test"] & names["development"]
    )
