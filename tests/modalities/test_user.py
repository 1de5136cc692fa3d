"""User layers: nobody is the base bit for bit, somebody is heard, and nothing else on the network is lost."""

import copy

import pytest
import torch
from torch import nn

import mmalign
from mmalign.modalities import user
from mmalign.records import UserError
from tests.tiny_video import cogvideox_transformer, wan_transformer

D = 6


def train_a_little(network):
    """Values other than their 0 at the start, so that users differ."""
    with torch.no_grad():
        for name, parameter in user.layers(network).items():
            if name.endswith("value.weight"):
                parameter.normal_()
    return network


def unet(xl=False):
    from diffusers import UNet2DConditionModel

    from tests.tiny import unet_config

    return UNet2DConditionModel(**unet_config(xl=xl)).eval()


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def wan():
    return wan_transformer().eval()


def cogvideox():
    return cogvideox_transformer(rotary=False).eval()


def pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=4,
        use_additional_conditions=False,
    ).eval()


def stable_audio():
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=12,
    ).eval()


NETWORKS = [unet, sd3, wan, cogvideox, pixart, stable_audio]


def call(network, who=None, rows=2):
    """The output for N latents; the same whoever it is for."""
    r = torch.Generator().manual_seed(1)
    given = user.arguments(network.forward, who)
    if type(network).__name__ in OTHERS:
        named = {name: torch.randn(rows, *shape, generator=r) for name, shape in OTHERS[type(network).__name__].items()}
        if "rotary_embedding" in named:
            named["rotary_embedding"] = (torch.ones(9, 4), torch.zeros(9, 4))
        return network(**named, timestep=torch.full((rows,), 500), return_dict=False, **given)[0]
    latents, t = torch.randn(rows, 4, 8, 8, generator=r), torch.full((rows,), 500)
    if "SD3" in type(network).__name__:
        text = {"encoder_hidden_states": torch.randn(rows, 5, 12, generator=r)}
        text["pooled_projections"] = torch.randn(rows, 10, generator=r)
        return network(hidden_states=latents, timestep=t, return_dict=False, **text, **given)[0]
    text = torch.randn(rows, 5, network.config.cross_attention_dim, generator=r)
    return network(latents, t, text, return_dict=False, **given)[0]


# Shapes of their arguments, without the samples
OTHERS = {
    "WanTransformer3DModel": {"hidden_states": (4, 2, 2, 4), "encoder_hidden_states": (5, 16)},
    "CogVideoXTransformer3DModel": {"hidden_states": (3, 4, 2, 4), "encoder_hidden_states": (226, 16)},
    "PixArtTransformer2DModel": {"hidden_states": (4, 8, 8), "encoder_hidden_states": (5, 12)},
    "StableAudioDiTModel": {
        "hidden_states": (4, 8),
        "encoder_hidden_states": (5, 12),
        "global_hidden_states": (1, 8),
        "rotary_embedding": (),
    },
}


@pytest.fixture(params=NETWORKS, ids=lambda make: make.__name__)
def pair(request):
    """A base, and the same with user layers that were trained."""
    base = request.param()
    personal = copy.deepcopy(base)
    user.add_layers(personal, D, tokens=4)
    return base, train_a_little(personal)


def test_nobody_and_zero_are_the_base_bit_for_bit(pair):
    base, personal = pair
    expected = call(base)
    assert torch.equal(call(personal), expected)
    assert torch.equal(call(personal, torch.zeros(2, D)), expected)
    who = torch.randn(2, D)
    assert not torch.equal(call(personal, who), expected)
    one = torch.stack([who[0], torch.zeros(D)])
    assert torch.equal(call(personal, one)[1], expected[1])


def test_zero_is_the_base_in_half_precision_and_under_autocast(pair):
    base, personal = (network.to(torch.bfloat16) for network in pair)
    for name, parameter in user.layers(personal).items():
        assert parameter.dtype == torch.bfloat16, name
        parameter.data = parameter.data.float()  # as in training: the layers float32, the rest as it was
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(personal, torch.zeros(2, D)), call(base))
        assert not torch.equal(call(personal, torch.randn(2, D)), call(base))


def test_untrained_layers_are_the_base_and_each_text_attention_has_one(pair):
    base, _ = pair
    network = copy.deepcopy(base)
    user.add_layers(network, D, tokens=4)
    assert torch.equal(call(network, torch.randn(2, D)), call(base))
    names = {name.rsplit(".user.", 1)[0] for name in user.layers(network) if ".user." in name}
    assert names == {name for name, _ in user.text_attentions(base)}
    assert all(name.endswith(("attn2", "attn", "attn1" if "Cog" in type(base).__name__ else "attn2")) for name in names)
    added = set(dict(network.named_parameters())) - set(dict(base.named_parameters()))
    assert added == set(user.layers(network))


def test_guidance_tells_the_second_half_alone(pair):
    _, personal = pair
    who = torch.randn(2, D)
    doubled = call(personal, who, rows=4)
    assert torch.equal(doubled, call(personal, torch.cat([torch.zeros(2, D), who]), rows=4))


def test_gradient_checkpointing_gives_the_same_gradient(pair):
    _, personal = pair
    who, gradients = torch.randn(2, D), []
    for checkpointing in (False, True):
        personal.requires_grad_(False).train()
        if checkpointing:
            personal.enable_gradient_checkpointing()
        for parameter in user.layers(personal).values():
            parameter.requires_grad_(True)
            parameter.grad = None
        call(personal, who).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in user.layers(personal).values()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_another_attention_processor_keeps_the_user():
    from diffusers.models.attention_processor import AttnProcessor

    network = unet()
    user.add_layers(train_a_little(network), D, tokens=4)
    train_a_little(network)
    who = torch.randn(2, D)
    expected = call(network, who)
    network.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(call(network, who), expected)
    network.set_attention_slice("max")
    torch.testing.assert_close(call(network, who), expected)
    assert not torch.allclose(call(network), expected)


def test_a_lora_on_the_same_projections_goes_together(pair):
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, personal = pair
    who = torch.randn(2, D)
    for network in (base, personal):
        torch.manual_seed(3)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), network)
        assert not [name for name in user.layers(network) if "lora" in name]
    assert torch.equal(call(personal, torch.zeros(2, D)), call(base))
    before = call(personal, who)
    for module in personal.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert not torch.allclose(call(personal, who), before)


def test_saved_and_loaded_is_the_same(pair, tmp_path):
    base, personal = pair
    who = torch.randn(2, D)
    user.save_layers(personal, tmp_path)
    for source in (tmp_path, tmp_path / user.LAYERS_FILE):
        fresh = copy.deepcopy(base)
        user.load_layers(fresh, source)
        assert torch.equal(call(fresh, who), call(personal, who))
        assert not any(parameter.requires_grad for parameter in user.layers(fresh).values())


def test_what_does_not_fit_is_one_sentence(pair, tmp_path):
    base, personal = pair
    with pytest.raises(UserError, match="no such user layers"):
        user.load_layers(base, tmp_path)
    user.save_layers(personal, tmp_path)
    other = sd3() if base.__class__.__name__.startswith("UNet") else unet(xl=True)  # of another width than all others
    with pytest.raises(UserError, match="another architecture"):
        user.load_layers(other, tmp_path)
    (tmp_path / user.LAYERS_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no file of user layers"):
        user.load_layers(base, tmp_path)
    with pytest.raises(UserError, match="has user layers already"):
        user.add_layers(personal, D, tokens=4)
    with pytest.raises(UserError, match="no text attention"):
        user.add_layers(nn.Linear(2, 2), D, tokens=4)
    with pytest.raises(UserError, match="cannot be told"):
        user.arguments(nn.Linear(2, 2).forward, torch.zeros(1, D))
    with pytest.raises(UserError, match="has no user layers"), user.telling(unet(), torch.zeros(1, D)):
        pass


def test_a_user_may_be_told_beside_the_call(pair):
    """Pipelines without attention kwargs (PixArt, Stable Audio) pass nothing on."""
    base, personal = pair
    who = torch.randn(2, D)
    with user.telling(personal, who):
        assert torch.equal(call(personal), call(personal, who))
    assert torch.equal(call(personal), call(base))


def test_a_call_without_the_text_hears_nobody():
    """Wan's pipeline guides by a second call."""
    base = wan()
    personal = copy.deepcopy(base)
    user.add_layers(personal, D, tokens=4)
    train_a_little(personal)
    who = torch.randn(2, D)
    expected = call(personal, who)
    with user.telling(personal, who):
        with personal.cache_context("uncond"):
            assert torch.equal(call(personal), call(base))
        with personal.cache_context("cond"):
            assert torch.equal(call(personal), expected)
    assert personal.cache_context.__func__ is type(personal).cache_context


def test_recomputed_blocks_hear_the_same_user_after_other_calls(pair):
    """A reference's call between forward and backward, as in every step of DPO."""
    _, personal = pair
    who, gradients = torch.randn(2, D), []
    for between in (False, True):
        personal.requires_grad_(False).train().enable_gradient_checkpointing()
        for parameter in user.layers(personal).values():
            parameter.requires_grad_(True)
            parameter.grad = None
        loss = call(personal, who).square().mean()
        if between:
            with torch.no_grad():
                call(personal)
                call(personal, 2 * who)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in user.layers(personal).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("which", ["tiny_sdxl", "tiny_sd15"])
def test_a_pipeline_generates_for_a_user(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    modality = mmalign.load(folder)
    prompts, settings = ["a red fox", "a fox"], {"seeds": [1, 2], "num_inference_steps": 2, "guidance_scale": 3.0}
    base = modality.generate(prompts, **settings)
    modality.add_user_layers(D, 4)
    train_a_little(modality.network)
    who = torch.randn(D)
    pictures = modality.generate(prompts, user=who, **settings)
    assert [p.tobytes() for p in modality.generate(prompts, user=torch.zeros(D), **settings)] == [
        p.tobytes() for p in base
    ]
    assert pictures[0].tobytes() != base[0].tobytes()
    both = modality.generate(prompts, user=torch.stack([who, torch.zeros(D)]), **settings)
    assert [p.tobytes() for p in both] == [pictures[0].tobytes(), base[1].tobytes()]
    modality.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [user.LAYERS_FILE]
    again = mmalign.load(folder, user_layers=tmp_path).generate(prompts, user=who, **settings)
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures]
