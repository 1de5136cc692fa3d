import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from mmalign import embedded
from mmalign.embedded import scenes


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionXLPipeline.from_pretrained(embedded.path(), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, texts, seed=0, **kw):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    out = pipe(texts, generator=generators, output_type="np", **{**embedded.SAMPLING, **kw})
    return (out.images * 255).round().astype(np.uint8)


def test_loads_in_float32_and_is_small(pipe):
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    assert sum(file.stat().st_size for file in embedded.path().rglob("*") if file.is_file()) < 13.6e6
    assert not pipe.config.force_zeros_for_empty_prompt
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_the_tokenizer_is_clips_and_knows_every_word(pipe):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer([*embedded.prompts("test"), "", "naïve Füchse, 3 of them!"]).input_ids
        assert max(map(len, ids)) <= tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings
        assert all(row[0] == 4608 and row[-1] == 4609 and 4609 not in row[:-1] for row in ids)  # unknown is 4609 too
        assert tokenizer.decode(tokenizer("a small fox").input_ids, skip_special_tokens=True) == "a small fox"


def test_pictures_are_deterministic_and_do_not_depend_on_the_batch(pipe):
    texts = embedded.prompts("development")[:3]
    first = pictures(pipe, texts, num_inference_steps=3)
    assert first.shape == (3, 64, 64, 3)
    assert np.array_equal(first, pictures(pipe, texts, num_inference_steps=3))
    alone = pictures(pipe, texts[1:2], seed=1, num_inference_steps=3)
    assert np.abs(alone[0].astype(int) - first[1]).max() <= 2
    assert not np.array_equal(first[0], pictures(pipe, texts[:1], seed=9, num_inference_steps=3)[0])


def test_grounds_follow_prompts_of_combinations_never_trained_on(pipe):
    texts = embedded.prompts("development")[:32]
    made = pictures(pipe, texts)
    right = [scenes.ground(picture) == text.split()[-2] for picture, text in zip(made, texts, strict=True)]
    assert np.mean(right) > 0.9  # chance is 1 in 8


def test_the_vae_reconstructs_and_its_latents_are_centred(pipe):
    every = scenes.random_scenes(48, 1, "development")
    x = torch.from_numpy(np.stack([scenes.render(scene) for scene in every])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x.contiguous()).latent_dist.mean
        error = (pipe.vae.decode(latents).sample.clamp(-1, 1) - x).div(2).square().mean((1, 2, 3))
    assert -10 * error.log10().mean() > 27
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.3


def test_figures_and_card_are_there():
    figures = json.loads((embedded.path().parents[2] / "benchmarks" / "embedded.json").read_text())
    assert figures["sampling"]["split"] == "development"
    assert "MIT" in (embedded.path() / "README.md").read_text()


@pytest.mark.slow
def test_a_picture_of_the_model_inverted_and_denoised_again_comes_back():
    """Mean error over 32 pictures that the model made: 50 steps < 20 < 10."""
    import mmalign
    from mmalign.surrogate import Cond, DDIMInversion, Keys, NoisedProbe

    modality, n = mmalign.load(embedded.path()), 32
    prompts = embedded.prompts("development")[:n]
    cond, path = modality._embed(prompts), modality.path
    cond = Cond({**cond, "time_ids": torch.full((n, 6), 64.0) * torch.tensor([1, 1, 0, 0, 1, 1])})

    @torch.no_grad()
    def predict(x_t, t, cond, view="policy"):
        return modality.predict(NoisedProbe(path, x_t, t, torch.zeros_like(x_t), cond, x_t), view)

    def denoise(x, t, steps):
        times = path.grid(t, steps).flip(0)
        for start, end in pairwise(times):
            x = path.move(predict(x, start, cond), x, start, end)
        return x

    size = modality.unet.config.sample_size
    start = torch.randn(n, modality.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    made = denoise(start, torch.full((n,), 999), 20)
    keys = Keys(0, torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64))
    errors = []
    for steps in (10, 20, 50):
        probe = DDIMInversion(steps=steps)(made, cond, keys, path, predict)
        errors.append((denoise(probe.x_t, probe.t, steps) - made).square().mean().item())
    assert errors[2] < errors[1] < errors[0] < 0.2 * made.square().mean().item()
