"""Single-file checkpoints: original weight names are written here from a tiny pipeline, and read back."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

import mmalign
from mmalign.modalities import single_file
from mmalign.modalities.image_unet import load
from mmalign.records import UserError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def replaced(key, table):
    for ours, original in table.items():
        if key.startswith(ours + "."):
            return original + key[len(ours) :]
    return key


def original_unet(key, layers=1, attention_up=(True, False)):
    """diffusers' name of a UNet weight -> the original one, for one layer a block."""
    key = replaced(key, UNET_TOP)
    if found := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key):
        side, block, kind, number, rest = found.groups()
        block, number = int(block), int(number)
        place = (layers + 1) * block + number + (side == "down")
        if kind == "downsamplers":
            key = f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            key = f"output_blocks.{(layers + 1) * block + layers}.{1 + attention_up[block]}.{rest}"
        else:
            stem = "input_blocks" if side == "down" else "output_blocks"
            key = f"{stem}.{place}.{0 if kind == 'resnets' else 1}.{rest}"
    stem, _, rest = key.rpartition(".0.") if ".0." in key else ("", "", "")
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", key):
        stem, rest = re.match(r"((?:input_blocks|output_blocks)\.\d+\.0|middle_block\.[02])\.(.*)", key).groups()
        key = f"{stem}.{replaced(rest, RESNET)}"
    return "model.diffusion_model." + key


def original_vae(key, value, blocks=2):
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key):
        part, side, block, kind, number, rest = found.groups()
        level = int(block) if side == "down" else blocks - 1 - int(block)
        inner = f"block.{number}" if kind == "resnets" else f"{side}sample"
        key = f"{part}.{side}.{level}.{inner}.{rest}"
    elif found := re.match(r"(encoder|decoder)\.mid_block\.(\w+)\.(\d)\.(.*)", key):
        part, kind, number, rest = found.groups()
        if kind == "resnets":
            key = f"{part}.mid.block_{int(number) + 1}.{rest}"
        else:
            key = f"{part}.mid.attn_1.{replaced(rest, VAE_ATTENTION)}"
            if value.ndim == 2:
                value = value[:, :, None, None]
    return "first_stage_model." + key, value


def original_open_clip(state):
    """transformers' second text encoder -> open_clip names; query, key and value are one matrix there."""
    made, packed = {}, {}
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if found := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", key):
            layer, which, kind = found.groups()
            packed.setdefault((layer, kind), {})[which] = value
        elif found := re.match(r"encoder\.layers\.(\d+)\.(.*)", key):
            made[f"transformer.resblocks.{found[1]}.{replaced(found[2], OPEN_CLIP)}"] = value
        elif key.startswith("final_layer_norm"):
            made[key.replace("final_layer_norm", "ln_final")] = value
        elif key == "text_projection.weight":
            made["text_projection"] = value.T
        elif key == "embeddings.token_embedding.weight":
            made["token_embedding.weight"] = value
        elif key == "embeddings.position_embedding.weight":
            made["positional_embedding"] = value
    for (layer, kind), parts in packed.items():
        made[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([parts[which] for which in "qkv"])
    return {f"conditioner.embedders.1.model.{key}": value for key, value in made.items()}


def write_original(pipeline, file):
    state = {original_unet(key): value for key, value in pipeline.unet.state_dict().items()}
    state |= dict(original_vae(key, value) for key, value in pipeline.vae.state_dict().items())
    xl = hasattr(pipeline, "text_encoder_2")
    stem = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    for key, value in pipeline.text_encoder.state_dict().items():
        state[stem + "text_model." + key.removeprefix("text_model.")] = value
    if xl:
        state |= original_open_clip(pipeline.text_encoder_2.state_dict())
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)
    return file


@pytest.mark.parametrize(
    ("family", "kind"), [("tiny_sdxl", StableDiffusionXLPipeline), ("tiny_sd15", StableDiffusionPipeline)]
)
def test_a_single_file_gives_the_folders_pictures(family, kind, request, tmp_path):
    folder = request.getfixturevalue(family)
    file = write_original(kind.from_pretrained(folder), tmp_path / "model.safetensors")
    ours, expected = load(file, config=folder), mmalign.load(folder)
    assert type(ours.pipeline) is kind
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if ours.is_xl else [])):
        a, b = getattr(ours.pipeline, part).state_dict(), getattr(expected.pipeline, part).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), part
    settings = {"seeds": [3], "num_inference_steps": 2}
    assert (
        ours.generate(["a red fox"], **settings)[0].tobytes()
        == expected.generate(["a red fox"], **settings)[0].tobytes()
    )


def test_bundled_configurations_are_the_published_models():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        unets = [count(UNet2DConditionModel.from_config(c["unet"])) for c in (single_file.SD15, single_file.SDXL)]
        vae = count(AutoencoderKL.from_config(single_file.SDXL["vae"]))
        encoders = [
            count(CLIPTextModel(CLIPTextConfig(**single_file.CLIP_L))),
            count(CLIPTextModelWithProjection(CLIPTextConfig(**single_file.BIG_G))),
        ]
    assert unets == [859_520_964, 2_567_463_684]
    assert vae == 83_653_863
    assert encoders == [123_060_480, 694_659_840]


def test_the_tokenizer_is_openais():
    import open_clip

    ours, official = single_file.tokenizer(), open_clip.get_tokenizer("ViT-L-14")
    for text in ("a red fox on the left, 85mm photo!", "Ünïcode café 3.14 don't", "", "x" * 300):
        expected = official([text])[0].tolist()
        end = expected.index(49407) + 1  # open_clip pads by 0, OpenAI's by the end symbol
        got = ours(text, padding="max_length", truncation=True, max_length=77).input_ids
        assert got[:end] == expected[:end]
        assert set(got[end:]) <= {49407}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"x", "convert it to .safetensors"),
        ("model.safetensors", b"x", "no whole safetensors file"),
        ("gone.safetensors", None, "no such file"),
    ],
)
def test_files_that_are_none(name, content, message, tmp_path):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        mmalign.load(tmp_path / name)


def test_another_models_file_is_refused(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"no SD1\.5 or SDXL checkpoint"):
        mmalign.load(tmp_path / "flux.safetensors")
