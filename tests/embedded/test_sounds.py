import itertools
import json

import numpy as np
import pytest
import torch

from mmalign import embedded
from mmalign.embedded import listen, sounds


def rendered(pieces):
    return torch.from_numpy(np.stack([sounds.render(piece) for piece in pieces]))


def test_held_out_combinations_are_disjoint_from_all_training():
    parts = {name: set(sounds.combinations(name)) for name in sounds.SPLITS}
    for a, b in itertools.combinations(("train", "development", "test"), 2):
        assert not parts[a] & parts[b], (a, b)
    assert parts["pairs"] < parts["train"]
    assert len(parts["train"] | parts["development"] | parts["test"]) == 8 + 28 + 56
    for name in ("pairs", "development", "test"):
        counts = [sum(kind in kinds for kinds in parts[name]) for kind in sounds.KINDS]
        assert len(set(counts)) == 1, name


def test_prompts_are_disjoint_and_say_their_events():
    parts = {name: sounds.prompts(name) for name in sounds.SPLITS}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 2064, "pairs": 832, "development": 448, "test": 416,
    }  # fmt: skip
    assert not set(parts["train"]) & set(parts["test"]) | set(parts["train"]) & set(parts["development"])
    for prompt in itertools.chain(*parts.values()):
        assert sounds.caption(sounds.events(prompt)) == prompt
    assert sounds.caption((("high", "beep"), ("two", "clicks"))) == "first a high beep, then two clicks"


def test_sounds_repeat_and_all_of_a_piece_matters():
    piece = sounds.Piece((("high", "beep"), ("low", "hiss")), (2, 18), (12, 13), (0.8, 0.6), 3)
    wave = sounds.render(piece)
    assert wave.shape == (sounds.CELLS * sounds.GRID,)
    assert wave.dtype == np.float32
    assert np.array_equal(wave, sounds.render(piece))
    for other in ({"seed": 4}, {"starts": (3, 18)}, {"lengths": (12, 14)}, {"loudness": (0.8, 0.7)}):
        assert not np.array_equal(wave, sounds.render(sounds.Piece(**{**vars(piece), **other}))), other
    every = sounds.random_pieces(200, 5, "development")
    assert every == sounds.random_pieces(200, 5, "development")
    assert {frozenset(kind for _, kind in p.events) for p in every} <= set(sounds.combinations("development"))
    assert max(p.starts[-1] + p.lengths[-1] for p in every) <= sounds.CELLS
    assert rendered(every).abs().max() <= 1


def test_what_goes_astray_lacks_an_event_or_has_two_exchanged():
    rng, lacking = np.random.RandomState(0), []
    for piece in sounds.random_pieces(200, 8, "train"):
        heard = sounds.astray(rng, piece.events, "train")
        assert frozenset(kind for _, kind in heard) in sounds.combinations("train")
        if len(piece.events) == 1:
            assert heard == piece.events
            continue
        assert set(heard) <= set(piece.events)
        assert listen.in_order(heard, piece.events) == len(piece.events) - 1
        lacking.append(len(heard) < len(piece.events))
    assert 0.3 < np.mean(lacking) < 0.7


@pytest.mark.parametrize("hear", [listen.template_events, listen.network_events])
def test_a_judge_hears_what_was_rendered(hear):
    pieces = sounds.random_pieces(60, 6, "development")
    right = [found == piece.events for found, piece in zip(hear(rendered(pieces)), pieces, strict=True)]
    assert np.mean(right) > 0.95


@pytest.mark.parametrize("score", [listen.template_scores, listen.network_scores])
def test_a_judge_prefers_the_right_events_in_the_right_order(score):
    wanted = (("high", "beep"), ("low", "buzz"), ("two", "clicks"))
    others = {
        "exchanged": (("low", "buzz"), ("high", "beep"), ("two", "clicks")),
        "left out": (("high", "beep"), ("two", "clicks")),
        "another": (("high", "beep"), ("low", "bell"), ("two", "clicks")),
        "variant": (("high", "beep"), ("low", "buzz"), ("three", "clicks")),
        "one too many": (*wanted[:2], ("low", "drop"), ("two", "clicks")),
    }
    rng = np.random.RandomState(0)
    waves = rendered([sounds.random_piece(rng, sequence) for sequence in (wanted, *others.values())])
    scores = score(waves, [sounds.caption(wanted)] * len(waves))
    for name, value in zip(others, scores[1:], strict=True):
        assert value < scores[0] - 0.02, name
    assert torch.allclose(score(waves[2:3], [sounds.caption(wanted)]), scores[2:3], atol=1e-4)


def test_silence_and_noise_hold_no_events():
    noise = 0.003 * torch.randn(2, sounds.CELLS * sounds.GRID, generator=torch.Generator().manual_seed(0))
    noise[1] = 0
    assert listen.template_events(noise) == [(), ()]
    assert listen.network_events(noise) == [(), ()]
    assert (listen.template_scores(noise, ["a low beep", "a low beep"]) < 0.2).all()


def test_in_order_is_the_longest_common_subsequence():
    a, b, c = sounds.EVENTS[:3]
    assert listen.in_order((a, b, c), (a, b, c)) == 3
    assert listen.in_order((c, a, b), (a, b, c)) == 2
    assert listen.in_order((c, b, a), (a, b, c)) == 1
    assert listen.in_order((), (a, b, c)) == 0


# --- the model


@pytest.fixture(scope="module")
def pipe():
    from diffusers import StableAudioPipeline

    pipe = StableAudioPipeline.from_pretrained(embedded.path("t2a"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe, texts, seed=0, **settings):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    return pipe(texts, generator=generators, **{**embedded.AUDIO_SAMPLING, **settings}).audios[:, 0]


def test_loads_in_float32_and_is_small(pipe):
    assert {module.dtype for module in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {torch.float32}
    assert sum(file.stat().st_size for file in embedded.path("t2a").rglob("*") if file.is_file()) < 10e6
    assert pipe.transformer.config.sample_size * pipe.vae.hop_length == sounds.CELLS * sounds.GRID
    assert pipe.vae.config.sampling_rate == sounds.RATE


def test_the_tokenizer_knows_every_word(pipe):
    ids = pipe.tokenizer(sounds.prompts("test")).input_ids
    assert max(map(len, ids)) <= pipe.tokenizer.model_max_length
    assert all(pipe.tokenizer.unk_token_id not in row for row in ids)
    assert pipe.tokenizer.decode(ids[0], skip_special_tokens=True) == sounds.prompts("test")[0]


def test_the_vae_keeps_what_is_heard_and_its_latents_are_centred(pipe):
    pieces = sounds.random_pieces(24, 7, "development")
    with torch.no_grad():
        latents = pipe.vae.encode(rendered(pieces)[:, None]).latent_dist.mean
        heard = listen.template_events(pipe.vae.decode(latents).sample[:, 0])
    assert np.mean([found == piece.events for found, piece in zip(heard, pieces, strict=True)]) > 0.8
    assert latents.mean((0, 2)).abs().max() < 0.3
    assert (latents.std((0, 2)) - 1).abs().max() < 0.5  # it overshoots the codes by a tenth to a fifth


def test_sounds_repeat_and_do_not_depend_on_the_batch(pipe):
    texts = sounds.prompts("development")[:2]
    first = made(pipe, texts, num_inference_steps=3)
    assert first.shape == (2, sounds.CELLS * sounds.GRID)
    assert torch.equal(first, made(pipe, texts, num_inference_steps=3))
    assert torch.allclose(made(pipe, texts[1:], seed=1, num_inference_steps=3)[0], first[1], atol=1e-3)
    assert not torch.allclose(made(pipe, texts[:1], seed=9, num_inference_steps=3)[0], first[0], atol=1e-3)


def test_sounds_follow_prompts_of_combinations_never_trained_on(pipe):
    texts = sounds.prompts("development")[:32]
    waves = made(pipe, texts)
    own, others = listen.network_scores(waves, texts), listen.network_scores(waves, texts[1:] + texts[:1])
    assert (own > others).float().mean() > 0.8  # chance is one half


def test_figures_and_card_are_there():
    figures = json.loads((embedded.path().parents[2] / "benchmarks" / "embedded_audio.json").read_text())
    assert figures["sampling"]["split"] == "development"
    assert "Oobleck" in (embedded.path("t2a") / "README.md").read_text()
