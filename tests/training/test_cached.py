import json
import shutil
from dataclasses import replace

import pytest
import torch

import mmalign
from mmalign.data.cache import EMPTY
from mmalign.data.export import write_comparisons
from mmalign.data.users import Users, write_users
from mmalign.objectives import PPD, DiffusionDPO, InPO, MaPO, RankDPO, SmPO
from mmalign.records import UserError
from mmalign.surrogate import DDIMInversion, FreshNoise, ReNoise
from mmalign.training.cached import cache_of, facts_of, fingerprints, read_data
from mmalign.training.loop import train
from mmalign.training.run import Run
from tests.conftest import picture
from tests.tiny import tiny_pipeline, tiny_vlm

REFERENCE = DDIMInversion(steps=2, view="reference")
METHODS = {
    "dpo": DiffusionDPO(beta=100.0),
    "mapo": MaPO(beta=0.1, snr=0.5, T=1000),
    "smpo": SmPO(beta=100.0, draw=ReNoise(steps=2)),
    "inpo": InPO(beta=100.0, draw=DDIMInversion(steps=2, eta=0.1)),
    "rankdpo": RankDPO(beta=100.0),
    "ppd": PPD(beta=100.0),
    "inpo, reference": InPO(beta=100.0, draw=REFERENCE),
    "smpo, fresh": SmPO(beta=100.0, draw=FreshNoise()),
}
CACHEABLE = ["dpo", "rankdpo", "ppd", "inpo, reference", "smpo, fresh"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, pairs):
    """Eleven scored pairs, and a tie, of two users, on the disk."""
    folder = tmp_path_factory.mktemp("data")
    scored = [
        replace(item, score=(0.2 + 0.05 * i, 0.9 - 0.05 * i), user=f"user {i % 2}") for i, item in enumerate(pairs)
    ]
    write_comparisons(folder, scored)
    return folder


@pytest.fixture
def recipe(tiny_sdxl, data, tmp_path):
    return Run(
        str(tiny_sdxl), str(data), str(tmp_path / "run"), METHODS["dpo"], 4, 1e-3,
        train_batch_size=3, rank=2, seed=3, proportion_empty_prompts=0.3,
    )  # fmt: skip


def losses(run, tmp_path, **settings):
    """Of every step, and the final weights' norms."""
    rows = []
    count = len(list(tmp_path.glob("run-*")))
    run = replace(run, output_dir=str(tmp_path / f"run-{count}"), **settings)
    train(run, watch=lambda step, metrics: rows.append([metrics["loss"], metrics["grad_norm"]]), say=lambda line: None)
    return torch.tensor(rows)


def of(method, recipe, tmp_path):
    if method == "ppd":
        vectors = {f"user {n}": torch.randn(8, generator=torch.Generator().manual_seed(n)) for n in range(2)}
        write_users(tmp_path / "users.safetensors", Users(vectors))
        recipe = replace(recipe, users=str(tmp_path / "users.safetensors"), objective=METHODS[method])
    return replace(recipe, objective=METHODS[method])


def same(a, b):
    assert torch.allclose(a[:, 0], b[:, 0], rtol=0, atol=1e-5)
    assert torch.allclose(a[:, 1], b[:, 1], rtol=1e-2)


@pytest.mark.parametrize("method", [name for name in METHODS if "," not in name])
def test_latents_and_text_from_the_cache_are_training_live(method, recipe, tmp_path):
    run = of(method, recipe, tmp_path)
    live = losses(run, tmp_path)
    same(losses(run, tmp_path, cache_dir=str(tmp_path / "cache")), live)


@pytest.mark.parametrize("method", CACHEABLE)
@pytest.mark.parametrize("backward", ["plain", "two-pass"])
def test_the_reference_from_the_cache_is_the_live_one(method, backward, recipe, tmp_path, monkeypatch):
    run = replace(of(method, recipe, tmp_path), draws_per_sample=2, max_train_steps=6, backward=backward)
    live = losses(run, tmp_path)
    cached = {"cache_dir": str(tmp_path / "cache"), "cache_reference": True}
    same(losses(run, tmp_path, **cached), live)
    if "reference" not in method:  # then nothing asks for the reference any more
        from mmalign.training.views import WeightViews

        real = WeightViews.__call__

        def policy_alone(self, view):
            assert view == "policy"
            return real(self, view)

        monkeypatch.setattr(WeightViews, "__call__", policy_alone)
    same(losses(run, tmp_path, **cached), live)


def test_a_full_fine_tune_keeps_no_copy_with_a_cached_reference(recipe, tmp_path, monkeypatch):
    run = replace(recipe, use_lora=False, learning_rate=1e-4, draws_per_sample=2)
    live = losses(run, tmp_path)
    from mmalign.training import views

    monkeypatch.setattr(views, "copy", None)  # making a second network is an error now
    same(losses(run, tmp_path, cache_dir=str(tmp_path / "cache"), cache_reference=True), live)
    saved = tmp_path / "run-1"
    monkeypatch.undo()
    assert mmalign.load(saved).generate(["a red fox"], seeds=[0], num_inference_steps=1)  # with its encoders


def test_training_from_the_cache_loads_no_encoder(recipe, tmp_path, monkeypatch):
    run = replace(recipe, cache_dir=str(tmp_path / "cache"))
    losses(run, tmp_path)
    loaded, real = [], mmalign.load

    def watched(*args, **options):
        loaded.append(real(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(mmalign, "load", watched)
    losses(run, tmp_path)
    (modality,) = loaded
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    assert [getattr(modality.pipeline, name) for name in parts] == [None] * 5
    assert modality.resolution == 16
    assert modality.generate(["a red fox"], seeds=[0], num_inference_steps=1)[0].size == (16, 16)  # loads them


def test_one_sample_of_the_posterior_is_half_and_stays(recipe, tmp_path):
    run = replace(recipe, cache_dir=str(tmp_path / "cache"), cache_moments=False)
    cache = cache_of(run, torch.float32, "cpu")
    again = cache_of(replace(run, cache_dir=str(tmp_path / "other")), torch.float32, "cpu")
    key = cache[0].media[0]
    assert set(cache.pieces[key]) == {"x0", "size"}
    assert torch.equal(cache.pieces[key]["x0"], again.pieces[key]["x0"])
    moments = cache_of(replace(run, cache_moments=True), torch.float32, "cpu").pieces[key]
    distance = (cache.pieces[key]["x0"] - moments["x0"]) / moments["x0_std"]
    assert distance.std().item() == pytest.approx(1, abs=0.2)
    assert torch.isfinite(losses(run, tmp_path)).all()


def test_the_empty_prompt_is_cached(recipe, tiny_sdxl, tmp_path):
    cache = cache_of(replace(recipe, cache_dir=str(tmp_path / "cache")), torch.float32, "cpu")
    expected = mmalign.load(tiny_sdxl).empty()
    assert all(torch.equal(cache.pieces[EMPTY][name], value[0]) for name, value in expected.items())


def test_prompts_and_pictures_are_stored_once(tiny_sdxl, recipe, tmp_path, pairs):
    repeated = [replace(pairs[0], id=f"{n}", media=(picture(0), picture(n + 1))) for n in range(4)]
    write_comparisons(tmp_path / "data", repeated)
    run = replace(recipe, dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    cache = cache_of(run, torch.float32, "cpu")
    assert len(cache) == 4
    assert len(cache.pieces.index) == 1 + 4 + 1 + 1  # a picture they share, four others, a prompt, the empty one


def test_buckets_train_live_and_cached_alike(recipe, tmp_path, pairs):
    sizes = [(40, 20), (20, 40), (32, 32)]
    data = [
        replace(item, media=(picture(2 * i, sizes[i % 3]), picture(2 * i + 1))) for i, item in enumerate(pairs)
    ]  # fmt: skip
    write_comparisons(tmp_path / "data", data)
    run = replace(recipe, dataset_name=str(tmp_path / "data"), resolution=32, aspect_buckets=True)
    cached = replace(run, cache_dir=str(tmp_path / "cache"))
    cache = cache_of(cached, torch.float32, "cpu")
    assert {cache[n].shape for n in range(12)} == {(16, 64), (48, 16), (32, 32)}
    assert {tuple(cache.pieces[cache[0].media[k]]["x0"].shape) for k in range(2)} == {(4, 8, 32)}  # the first's frame
    # One batch of everything: the order within it does not matter, and shapes do not mix
    live = losses(run, tmp_path, train_batch_size=12)
    same(losses(cached, tmp_path, train_batch_size=12), live)


def test_what_changes_an_encoder_changes_the_cache(recipe, tmp_path, tiny_sd15):
    run = replace(recipe, cache_dir=str(tmp_path))
    own = facts_of(run, torch.float32)

    def folders(**settings):
        facts = facts_of(replace(run, **settings), torch.float32)
        return [facts.folder(tmp_path, kind) == own.folder(tmp_path, kind) for kind in ("media", "prompts", "items")]

    assert folders() == [True, True, True]
    assert folders(learning_rate=1.0, objective=METHODS["mapo"]) == [True, True, True]
    assert folders(resolution=32) == [False, True, False]
    assert folders(aspect_buckets=True) == [False, True, False]
    assert folders(pretrained_vae_model_name_or_path=str(tiny_sd15 / "vae")) == [False, True, False]
    assert folders(max_train_samples=3) == [True, True, False]
    assert folders(dataset_fraction=0.5) == folders(aspect="fidelity") == [True, True, False]
    assert folders(pretrained_model_name_or_path=str(tiny_sd15)) == [False, False, False]
    larger = shutil.copytree(recipe.pretrained_model_name_or_path, tmp_path / "larger")
    config = larger / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 16}))
    assert folders(pretrained_model_name_or_path=str(larger)) == [False, True, False]  # the same VAE, other pictures
    other = tiny_pipeline(tmp_path / "other", xl=True, seed=1)
    assert folders(pretrained_model_name_or_path=str(other)) == [False, False, False]
    half = facts_of(run, torch.bfloat16)
    assert half.folder(tmp_path, "media") != own.folder(tmp_path, "media")


def test_an_aspect_and_a_share_of_the_data(recipe, tmp_path, pairs):
    judged = [replace(item, aspects={"fidelity": item.score[::-1], "looks": (0.5, 0.25)}) for item in pairs]
    write_comparisons(tmp_path / "judged", judged)
    run = replace(recipe, dataset_name=str(tmp_path / "judged"), dataset_fraction=0.5, aspect="fidelity")
    found = list(read_data(run, strict=True).comparisons)
    assert [item.score for item in found] == [item.score[::-1] for item in pairs[:6]]
    same(losses(run, tmp_path, cache_dir=str(tmp_path / "cache")), losses(run, tmp_path))
    with pytest.raises(UserError, match="has no aspect 'taste', but fidelity, looks"):
        read_data(replace(run, aspect="taste"), strict=True)


def test_an_edited_file_is_seen(tmp_path, tiny_sdxl):
    shutil.copytree(tiny_sdxl, tmp_path / "model")
    before = fingerprints(tmp_path / "model", tmp_path)
    assert fingerprints(tmp_path / "model", tmp_path) == before
    file = tmp_path / "model" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 0.5}))
    after = fingerprints(tmp_path / "model", tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"vae"}


@pytest.mark.parametrize("method", ["smpo", "inpo"])
def test_a_reference_under_the_policy_is_refused(method, recipe, tmp_path):
    with pytest.raises(UserError, match=r'under the policy.*view="reference"'):
        replace(recipe, objective=METHODS[method], cache_dir="c", draws_per_sample=2, cache_reference=True)


def test_cached_references_need_fixed_draws_and_a_reference(recipe):
    with pytest.raises(UserError, match="draws_per_sample"):
        replace(recipe, cache_dir="c", cache_reference=True)
    with pytest.raises(UserError, match="no reference"):
        replace(recipe, objective=METHODS["mapo"], cache_dir="c", draws_per_sample=1, cache_reference=True)


def test_fixed_draws_come_round(recipe, tmp_path):
    """With one draw and one batch of all the data, a step without learning is the step before."""
    settings = {"train_batch_size": 11, "learning_rate": 1e-30, "objective": MaPO(beta=0.1, snr=0.5, T=1000)}
    fixed = losses(recipe, tmp_path, **settings, draws_per_sample=1)[:, 0]
    assert torch.allclose(fixed, fixed[:1], rtol=0, atol=1e-6)
    two = losses(recipe, tmp_path, **settings, draws_per_sample=2)[:, 0]
    assert torch.allclose(two[:2], two[2:], rtol=0, atol=1e-6)
    assert abs(two[0] - two[1]) > 1e-5


def test_text_answers_are_cached_with_their_pictures(tmp_path):
    from mmalign.records import Comparison, Text

    model = tiny_vlm(tmp_path / "model")
    items = [
        Comparison(
            f"answer {n}",
            "what is it?",
            (Text(f"a fox {n}"), Text("nothing")),
            (1, 0),
            condition=(picture(n, (56, 28)),),
        )
        for n in range(6)
    ]
    write_comparisons(tmp_path / "data", items)
    run = Run(
        str(model), str(tmp_path / "data"), str(tmp_path / "run"), DiffusionDPO(beta=0.1), 3, 1e-3, train_batch_size=2
    )
    live = losses(run, tmp_path)
    cached = {"cache_dir": str(tmp_path / "cache"), "draws_per_sample": 1, "cache_reference": True}
    same(losses(run, tmp_path, **cached), live)


def test_users_of_cached_data_are_checked_before_the_first_step(recipe, tmp_path):
    run = of("ppd", recipe, tmp_path)
    write_users(tmp_path / "users.safetensors", Users({"user 0": torch.ones(8)}))
    with pytest.raises(UserError, match="user 1"):
        losses(run, tmp_path, cache_dir=str(tmp_path / "cache"))


def test_a_hub_id_is_known_by_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    commit = ["a" * 40]

    def downloaded(source, name):
        if name != "config.json":
            raise FileNotFoundError(name)
        return str(tmp_path / "snapshots" / commit[0] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    before = fingerprints("some/model", tmp_path)
    assert fingerprints("some/model", tmp_path) == before
    commit[0] = "b" * 40
    assert fingerprints("some/model", tmp_path) != before

    def unreachable(source, name):
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="some/model: neither"):
        fingerprints("some/model", tmp_path)
