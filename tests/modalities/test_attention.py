"""Which attention a network gets: the first that is there and equal to math; and what else is on it stays."""

import copy
import importlib.util

import pytest
import torch
from diffusers.models import attention_processor as processors
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.modalities import attention, user
from mmalign.records import UserError
from tests.modalities.test_user import call, sd3, train_a_little, unet


class Kernels(TorchDispatchMode):
    """The names of the attention kernels that ran; math is made of matrix products and leaves the softmax."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "dot_product" in name or "softmax" in name:
            self.names.add("flash" if "flash" in name else "math")
        return function(*args, **(kwargs or {}))


def kernels(run):
    with Kernels() as seen:
        run()
    return seen.names


def inputs(network, dtype=torch.float32):
    """The arguments by name of what `call` in test_user calls."""
    joint = "SD3" in type(network).__name__
    text = {"encoder_hidden_states": torch.zeros(1, 5, 12 if joint else 8, dtype=dtype)}
    latents, t = torch.zeros(1, 4, 8, 8, dtype=dtype), torch.full((1,), 500)
    if joint:
        return {"hidden_states": latents, "timestep": t, "pooled_projections": torch.zeros(1, 10, dtype=dtype), **text}
    return {"sample": latents, "timestep": t, **text}


def use(network, name, dtype=torch.float32):
    return attention.use(network, name, lambda: inputs(network, dtype))


class Right(processors.AttnProcessor):
    """A stand-in for xformers' processor that is another implementation: plain products and a softmax."""


class Wrong(Right):
    def __call__(self, *args, **kwargs):
        return 1.001 * super().__call__(*args, **kwargs)


class WrongGradient(Right):
    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        return made.detach() + 0.9 * (made - made.detach())


class NoGradient(Right):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs).detach()


class NotFinite(Right):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * float("nan")


class Raising(Right):
    def __call__(self, *args, **kwargs):
        raise NotImplementedError("No operator found\nfor these inputs")


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a processor in the place of xformers', as if xformers were installed."""

    def put(processor):
        monkeypatch.setattr(attention, "find_spec", lambda name: object())
        monkeypatch.setattr(processors, "XFormersAttnProcessor", processor)

    return put


def processors_of(network):
    return {type(processor) for processor in network.attn_processors.values()}


def test_a_right_backend_is_used_on_every_module(stand_in):
    stand_in(Right)
    network = unet()
    expected = call(network)
    chosen, line = use(network, "xformers")
    assert chosen == "xformers"
    assert line == "Attention: xformers, equal to math in 2 kinds of call."
    assert processors_of(network) == {Right}
    torch.testing.assert_close(call(network), expected)
    assert use(network, "sdpa")[0] == "sdpa"
    assert processors_of(network) == {processors.AttnProcessor2_0}
    assert torch.equal(call(network), expected)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (Wrong, "it differs from math attention by 0.1%"),
        (WrongGradient, "it differs from math attention by 10.0%"),
        (NoGradient, "it failed ("),
        (NotFinite, "it differs from math attention by nan%"),
        (Raising, "it failed (No operator found)"),
    ],
)
def test_a_wrong_or_broken_backend_is_passed_over_in_one_line(stand_in, processor, reason):
    stand_in(processor)
    network = unet()
    expected = call(network)
    chosen, line = use(network, "xformers")
    assert chosen == "sdpa"
    assert f"; not xformers: {reason}" in line
    assert "\n" not in line
    assert processors_of(network) == {processors.AttnProcessor2_0}
    assert torch.equal(call(network), expected)


def test_an_absent_backend_is_passed_over(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    chosen, line = use(unet(), "xformers")
    assert (chosen, line) == (
        "sdpa",
        "Attention: sdpa, equal to math in 2 kinds of call; not xformers: it is not installed.",
    )


def test_broken_sdpa_kernels_end_in_math(monkeypatch):
    """A machine whose flash kernel is wrong: everything but math is refused."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def broken(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made if torch._C._get_flash_sdp_enabled() is False else 1.5 * made

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    network = unet()
    chosen, line = use(network, "flash")
    assert chosen == "math"
    assert "not flash: it differs" in line
    assert "not sdpa: it differs" in line
    assert "not efficient: it failed" in line  # the CPU has none
    assert kernels(lambda: call(network)) == {"math"}


@pytest.mark.parametrize("make", [unet, sd3], ids=["unet", "sd3"])
def test_the_kernel_asked_for_is_the_kernel_that_runs(make):
    network = make()
    expected = call(network)
    assert use(network, "math")[0] == "math"
    assert kernels(lambda: call(network)) == {"math"}
    torch.testing.assert_close(call(network), expected)
    assert use(network, "flash")[0] == "flash"
    assert kernels(lambda: call(network)) == {"flash"}
    torch.testing.assert_close(call(network), expected)
    assert kernels(lambda: call(make())) == {"flash"}, "another network follows torch's own order"


def test_a_recomputed_block_and_a_deep_copy_keep_the_kernel():
    network = unet()
    use(network, "math")
    twin = copy.deepcopy(network)
    assert kernels(lambda: call(twin)) == {"math"}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert call(twin).abs().sum() > 0, "the copy computes with its own weights"
    twin.train().enable_gradient_checkpointing()
    loss = call(twin).square().mean()
    assert kernels(loss.backward) == {"math"}


def test_a_lora_and_user_layers_survive_and_are_survived():
    from peft import LoraConfig

    for make in (unet, sd3):
        network = make()
        user.add_layers(network, 6, tokens=4)
        train_a_little(network)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        who = torch.randn(2, 6)
        expected = call(network, who)
        assert use(network, "math")[0] == "math"
        torch.testing.assert_close(call(network, who), expected)
        assert not torch.allclose(call(network), expected)
        network.disable_adapters()
        assert not torch.allclose(call(network, who), expected)


def test_a_processor_of_somebody_elses_stays(stand_in):
    class Mine(processors.AttnProcessor2_0):
        pass

    stand_in(Right)
    network = unet()
    network.set_attn_processor(Mine())
    chosen, line = use(network, "xformers")
    assert chosen == "sdpa"
    assert "have no place for it" in line
    assert processors_of(network) == {Mine}


def test_checking_leaves_no_gradient_and_no_random_state_behind():
    network = unet()
    before = torch.random.get_rng_state()
    use(network, "flash")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_dispatching_transformer_gets_its_own_field_and_the_process_keeps_its_default(monkeypatch):
    from diffusers import FluxTransformer2DModel
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    network = FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), **sizes
    ).eval()
    given = {
        "hidden_states": torch.zeros(1, 16, 4),
        "encoder_hidden_states": torch.zeros(1, 5, 12),
        "pooled_projections": torch.zeros(1, 10),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    default = registry.get_active_backend()
    chosen, line = attention.use(network, "flash-attn", lambda: given)
    assert chosen == "sdpa"
    assert "not flash-attn: it failed" in line  # it is not installed
    seen = []

    def stand_in(query, key, value, **rest):
        seen.append(query.shape)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    name = next(name for name in registry._backends if name.value == "flash")
    monkeypatch.setitem(registry._backends, name, stand_in)
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value"})
    monkeypatch.setitem(registry._constraints, name, [])
    chosen, line = attention.use(network, "flash-attn", lambda: given)
    assert chosen == "flash-attn", line
    seen.clear()
    network(**given)
    assert len(seen) == 2
    assert registry.get_active_backend() == default


def test_a_vision_language_model(tmp_path):
    import mmalign
    from tests.tiny import tiny_vlm

    modality = mmalign.load(tiny_vlm(tmp_path))
    given = {"input_ids": torch.arange(12)[None], "use_cache": False}
    expected = modality.network(**given).logits
    assert kernels(lambda: modality.network(**given)) == {"flash"}
    chosen, line = attention.use(modality.network, "math", lambda: given)
    assert chosen == "math", line
    assert kernels(lambda: modality.network(**given)) == {"math"}
    torch.testing.assert_close(modality.network(**given).logits, expected)


def test_bfloat16_under_autocast_is_checked_in_bfloat16():
    network = unet()
    with torch.autocast("cpu", torch.bfloat16):
        chosen, line = use(network, "flash")
    assert chosen == "flash", line


def test_auto_on_the_cpu_does_nothing_and_an_unknown_name_is_one_sentence():
    network = unet()
    assert attention.use(network, "auto", pytest.fail) == ("sdpa", "Attention: sdpa.")
    with pytest.raises(UserError, match="attention 'fast' is none of auto, sdpa, flash"):
        use(network, "fast")


def test_the_names_of_a_recipe_are_the_backends():
    import typing

    from mmalign.training.run import Run

    names = typing.get_args(typing.get_type_hints(Run)["attention"])
    assert names == ("auto", *attention.KERNELS, *attention.PACKAGES)


@pytest.mark.parametrize("which", ["tiny_sdxl", "tiny_sd3"])
def test_a_run_trains_by_the_attention_it_asks_for_and_says_so(which, request, pairs, tmp_path):
    import json

    from mmalign.objectives import DiffusionDPO
    from mmalign.training.loop import train
    from mmalign.training.run import Run

    losses = {}
    for name in ("auto", "math"):
        run = Run(
            pretrained_model_name_or_path=str(request.getfixturevalue(which)),
            dataset_name="in memory",
            output_dir=str(tmp_path / name),
            objective=DiffusionDPO(beta=2000),
            max_train_steps=2,
            learning_rate=1e-3,
            rank=2,
            attention=name,
            gradient_checkpointing=True,
        )
        said = []
        ran = kernels(lambda run=run, said=said: train(run, comparisons=pairs[:2], say=said.append))
        lines = [line for line in said if line.startswith("Attention")]
        assert lines[0].startswith(f"Attention: {'sdpa' if name == 'auto' else 'math, equal to math in'}")
        assert len(lines) == 1
        assert "flash" in ran or name == "math"  # the text encoders' may be of any kind
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert losses["math"] == pytest.approx(losses["auto"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["xformers", "flash", "efficient", "cudnn", "sdpa"])
def test_backends_equal_math_on_a_card(name, dtype):
    """SDXL's own attention: 64 wide, 10 heads, 77 text tokens, and 1,024 of the picture."""
    from diffusers import UNet2DConditionModel

    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    network = UNet2DConditionModel(
        block_out_channels=(320, 640),
        layers_per_block=1,
        attention_head_dim=(5, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
    ).to("cuda", dtype)
    given = {
        "sample": torch.zeros(1, 4, 64, 64, device="cuda", dtype=dtype),
        "timestep": torch.zeros(1, device="cuda"),
        "encoder_hidden_states": torch.zeros(1, 77, 2048, device="cuda", dtype=dtype),
    }
    chosen, line = attention.use(network, name, lambda: given)
    assert chosen == name, line
