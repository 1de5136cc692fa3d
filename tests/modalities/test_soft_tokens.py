"""Users as soft tokens, and hidden picture tokens, on a tiny Qwen2-VL."""

from dataclasses import replace

import pytest
import torch

import mmalign
from mmalign.modalities.soft_tokens import hiding, told
from mmalign.modalities.user import LAYERS_FILE, add_layers, load_layers, save_layers
from mmalign.records import Comparison, Text, UserError
from mmalign.surrogate import Cond, TokenProbe
from tests.conftest import picture
from tests.tiny import tiny_vlm
from tests.tiny_vlm import FAMILIES

D = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vlm(tmp_path_factory.mktemp("tiny_vlm"))


@pytest.fixture
def modality(folder):
    return mmalign.load(folder, dtype=torch.float64)


def speaks_letters(modality):
    """Its answers are of small letters, spaces and full stops alone; bytes of other letters cannot be told apart."""
    tokenizer = modality.processor.tokenizer
    known = torch.tensor(tokenizer("abcdefghijklmnopqrstuvwxyz .").input_ids)

    def others_off(head, args, logits):
        return torch.full_like(logits, -1e9).index_copy(-1, known, logits[..., known])

    modality.network.lm_head.register_forward_hook(others_off)
    return modality


@pytest.fixture
def item():
    shown = (picture(1, (56, 56)),)
    return Comparison("x", "What is it?", (Text("A red fox."), Text("no")), (1, 0), condition=shown)


def personal(modality, tokens=4):
    """With user layers that were trained."""
    for parameter in modality.add_user_layers(D, tokens).values():
        assert not parameter.any()
        torch.nn.init.normal_(parameter, std=10)
    return modality


def asked(modality, item, user=None, view="policy"):
    encoded = modality.encode([item])
    entries, only = ({}, frozenset()) if user is None else ({"user": user.expand(2, -1)}, frozenset({"user"}))
    cond = Cond({**encoded.cond, **entries}, only)
    probe = TokenProbe(encoded.x0, encoded.cond["answer_mask"], cond)
    with torch.no_grad():
        return probe.logp(modality.predict(probe, view))


def test_zero_nobody_and_the_reference_are_the_base_bit_for_bit(modality, item):
    base = asked(modality, item)
    personal(modality)
    who = torch.randn(1, D)
    assert not torch.isclose(asked(modality, item, who), base).any()
    for other in (asked(modality, item), asked(modality, item, torch.zeros(1, D)), asked(modality, item, who, "ref")):
        assert torch.equal(other, base)
    mixed = asked(modality, item, torch.cat([who, torch.zeros(1, D)]))
    assert torch.equal(mixed, torch.stack([asked(modality, item, who)[0], base[1]]))
    assert not modality.network.get_input_embeddings()._forward_hooks


def test_what_is_added_is_a_map_of_the_user_on_the_first_tokens(modality, item):
    """By hand: the same logits from embeddings with the vectors in them, without any hook."""
    personal(modality)
    who, bare = torch.randn(1, D), replace(item, condition=None)  # with pictures the model itself makes embeddings
    encoded = modality.encode([bare])
    with torch.no_grad():
        embedded = modality.network.get_input_embeddings()(encoded.x0)
        soft = (modality.network.user.project.weight.double() @ who[0].double()).reshape(4, -1)
        embedded = torch.cat([embedded[:, :4] + soft, embedded[:, 4:]], 1)
        logits = modality.network(inputs_embeds=embedded, attention_mask=encoded.cond["attention_mask"]).logits
    probe = TokenProbe(encoded.x0, encoded.cond["answer_mask"], encoded.cond)
    assert torch.allclose(asked(modality, bare, who), probe.logp(logits), rtol=1e-5)  # the layers are float32


def test_answers_are_for_somebody_cached_or_not(modality, item):
    prompts, settings = [item.prompt] * 2, {"seeds": [1, 2], "images": [item.condition] * 2, "max_new_tokens": 8}
    settings["temperature"] = 0.1
    base = modality.generate(prompts, **settings)
    who = torch.randn(D)
    with pytest.raises(UserError, match="has no user layers"):
        modality.generate(prompts, user=who, **settings)
    personal(modality)
    made = modality.generate(prompts, user=who, **settings)
    assert made != base
    assert modality.generate(prompts, user=torch.zeros(D), **settings) == base
    assert modality.generate(prompts, user=torch.stack([who, torch.zeros(D)]), **settings) == [made[0], base[1]]
    modality.network.config.use_cache = modality.network.generation_config.use_cache = False
    assert modality.generate(prompts, user=who, **settings) == made


def test_saved_and_loaded_is_the_same(modality, folder, item, tmp_path):
    personal(modality)
    who = torch.randn(1, D)
    modality.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LAYERS_FILE]
    again = mmalign.load(folder, dtype=torch.float64, user_layers=tmp_path)
    assert torch.equal(asked(again, item, who), asked(modality, item, who))
    assert not any(parameter.requires_grad for parameter in again.network.parameters())
    with pytest.raises(UserError, match="has user layers already"):
        modality.add_user_layers(D, 4)
    wider = mmalign.load(tiny_vlm(tmp_path / "wider", width=32))
    with pytest.raises(UserError, match="another architecture"):
        load_layers(wider.network, tmp_path, wider.add_user_layers)


def test_layers_of_a_picture_model_are_refused(folder, tmp_path):
    from tests.modalities.test_user import unet

    network = unet()
    add_layers(network, D, tokens=4)
    save_layers(network, tmp_path)
    with pytest.raises(UserError, match="another architecture"):
        mmalign.load(folder, user_layers=tmp_path)


# --- hidden tokens ---


def test_hidden_tokens_are_those_that_no_mask_row_sees(modality, item):
    """By hand: the same logits from a mask of all four dimensions."""
    encoded = modality.encode([replace(item, media=item.media[:1], score=(1,))])
    inputs = modality._inputs(encoded.x0, encoded.cond)
    length = encoded.x0.shape[1]
    off = torch.zeros(length, dtype=torch.bool)
    off[[5, 7]] = True
    with torch.no_grad():
        plain = modality.network(**inputs).logits
        with hiding(modality.network, off):
            hidden = modality.network(**inputs).logits
        seen = torch.ones(length, length).tril().bool() & ~off
        positions = modality.network.model.compute_3d_position_ids(
            **{name: inputs[name] for name in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")},
            inputs_embeds=modality.network.get_input_embeddings()(encoded.x0),
        )
        inputs |= {"attention_mask": seen[None, None], "position_ids": positions}
        expected = modality.network(**inputs).logits
    assert torch.allclose(hidden, expected, rtol=1e-10)
    assert torch.equal(hidden[:, :5], plain[:, :5])
    assert not torch.isclose(hidden[:, 8:], plain[:, 8:]).all(-1).any()
    with torch.no_grad(), told(modality.network, None), hiding(modality.network, None):
        assert torch.equal(modality.network(**modality._inputs(encoded.x0, encoded.cond)).logits, plain)


def test_with_every_token_hidden_the_answer_does_not_depend_on_the_picture(modality):
    shown = [(picture(n, (56, 56)),) for n in range(4)]
    settings = {"seeds": [7] * 4, "images": shown, "max_new_tokens": 12, "temperature": 0.05}
    seen = modality.generate(["Hm"] * 4, **settings)
    assert len(set(seen)) > 1
    unseen = modality.generate(["Hm"] * 4, hidden=[lambda count: [True] * count] * 4, **settings)
    assert len(set(unseen)) == 1
    assert modality.generate(["Hm"] * 4, hidden=[lambda count: [False] * count] * 4, **settings) == seen
    assert not modality.network.get_decoder()._forward_pre_hooks


def test_an_answer_is_continued_and_stops_where_it_is_told_to(modality, item):
    settings = {"seeds": [3], "images": [item.condition]}
    speaks_letters(modality)
    (whole,) = modality.generate(["Hm"], max_new_tokens=9, **settings)
    (again,) = modality.generate(["Hm"], starts=[whole[:4]], max_new_tokens=5, **settings)
    assert again == whole  # a token a letter, and its draw depends on its place
    (cut,) = modality.generate(["Hm"], starts=[whole[:4]], stop=whole[6], max_new_tokens=20, **settings)
    assert cut == whole[: whole.index(whole[6], 4) + 1]
    with pytest.raises(UserError, match=r"special token <\|im_end\|>"):
        modality.generate(["Hm"], starts=["no<|im_end|>"], **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_hears_users_and_hides_tokens(name, tmp_path, item):
    modality = mmalign.load(FAMILIES[name](tmp_path), dtype=torch.float64)
    base = asked(modality, item)
    encoded = [modality.encode([replace(item, condition=(picture(n, (56, 56)),))]) for n in range(2)]

    def logits(one, share):
        off = modality._picture_tokens(one.x0[0], lambda count: [share] * count)
        assert off.sum() > 0 or not share
        with torch.no_grad(), hiding(modality.network, off):
            return modality.network(**modality._inputs(one.x0, one.cond)).logits[:, -3:]

    if name == "Gemma 3":  # its layers see pictures whole, by masks that the model makes itself
        with pytest.raises(UserError, match="attention masks in which no token can be hidden"):
            logits(encoded[0], True)
    else:
        assert torch.equal(*(logits(one, True) for one in encoded))
        assert not torch.equal(*(logits(one, False) for one in encoded))
    if name != "Gemma 3":  # the tiny one's two layers look 16 tokens back, and so not to the first ones
        assert not torch.isclose(asked(personal(modality), item, torch.randn(1, D)), base).any()
    else:
        personal(modality)
    assert torch.equal(asked(modality, item, torch.zeros(1, D)), base)
