"""Tiny pipelines of the picture families whose network is a transformer, in the real layouts; a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mmalign.records import Comparison
from tests.conftest import picture
from tests.tiny import t5_tokenizer, text_config, tiny_sd3, tiny_vae, write_tokenizer


def t5(width: int = 24):
    """Reads single letters; also its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    tokenizer, symbols = t5_tokenizer()
    reader = T5Config(vocab_size=symbols, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(reader), tokenizer


def flux_vae():
    return tiny_vae(
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )


def dynamic_shift():
    """As in FLUX.1 dev's folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def tiny_flux(folder: Path, *, guidance: bool = True, seed: int = 0) -> Path:
    """Saves a FluxPipeline; two pixels a latent."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, vocabulary = write_tokenizer(folder / "tokenizer")
        reader, letters = t5()
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
            guidance_embeds=guidance,
        )
        FluxPipeline(
            scheduler=dynamic_shift(),
            vae=flux_vae(),
            text_encoder=CLIPTextModel(text_config(vocabulary, 8, None)),
            tokenizer=tokenizer,
            text_encoder_2=reader,
            tokenizer_2=letters,
            transformer=transformer,
        ).save_pretrained(folder)
    return folder


def tiny_pixart(folder: Path, *, alpha: bool = False, seed: int = 0) -> Path:
    """Saves a PixArtSigmaPipeline, eight pixels a latent and pictures of 256; or alpha's, told sizes as at 1024."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader, letters = t5()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=24,
            sample_size=128 if alpha else 32,
            caption_channels=24,
        )
        (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
            tokenizer=letters,
            text_encoder=reader,
            vae=tiny_vae(levels=4, latent_channels=4, scaling_factor=0.13025),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        ).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    """Byte tokens with Qwen's special ones; also how many there are."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {symbol: number for number, symbol in enumerate([*bytes_to_unicode().values(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=[], eos_token=special[2], pad_token=special[0], unk_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer, len(ids)


def qwen3(symbols: int, layers: int):
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=symbols,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )


def tiny_flux2(folder: Path, seed: int = 0) -> Path:
    """Saves a Flux2KleinPipeline; two pixels a latent of the VAE. Its reader's layers 9, 18 and 27 are asked for."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = qwen_tokenizer()
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        Flux2KleinPipeline(
            scheduler=dynamic_shift(),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(qwen3(symbols, 27)),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
    return folder


def tiny_z_image(folder: Path, seed: int = 0) -> Path:
    """Saves a ZImagePipeline; two pixels a latent."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 64, 64],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):  # made empty, to be loaded
            torch.nn.init.normal_(token)
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flux_vae(),
            text_encoder=Qwen3Model(qwen3(symbols, 2)),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
    return folder


def tiny_qwen_image(folder: Path, seed: int = 0) -> Path:
    """Saves a QwenImagePipeline; four pixels a latent."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = qwen_tokenizer()
        reader = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": symbols,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
                "bos_token_id": None,
                "eos_token_id": None,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.5, 1.0, 2.0],
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        )
        QwenImagePipeline(
            scheduler=dynamic_shift(),
            vae=vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration(reader),
            tokenizer=tokenizer,
            transformer=transformer,
        ).save_pretrained(folder)
    return folder


def tiny_sana(folder: Path, seed: int = 0) -> Path:
    """Saves a SanaPipeline; 32 pixels a latent, pictures of 512."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = qwen_tokenizer()  # stands in for Gemma's: the pipeline asks nothing of it but tokens
        reader = Gemma2Config(
            vocab_size=symbols,
            hidden_size=24,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
        )
        levels = {
            "block_types": ("ResBlock",) * 6,
            "block_out_channels": (4,) * 6,
            "layers_per_block": (1,) * 6,
            "qkv_multiscales": ((),) * 6,
        }
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            scaling_factor=0.41407,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in levels.items()},
        )
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=24,
            sample_size=16,
        )
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(reader),
            vae=vae,
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "SD3": tiny_sd3,
    "FLUX.1": tiny_flux,
    "PixArt-Sigma": tiny_pixart,
    "FLUX.2 klein": tiny_flux2,
    "Qwen-Image": tiny_qwen_image,
    "Sana": tiny_sana,
    "Z-Image": tiny_z_image,
}
_QUICK = {"num_inference_steps": 2}
_SMALL = {**_QUICK, "height": 32, "width": 32}  # the pipelines' own size is 128 latents
SETTINGS: dict[str, dict] = {
    "SD3": _QUICK,
    "FLUX.1": _SMALL,
    "PixArt-Sigma": _QUICK,
    "FLUX.2 klein": _SMALL,
    "Qwen-Image": _SMALL,
    "Sana": {**_QUICK, "height": 512, "width": 512},  # the pipeline would enlarge them to 1024
    "Z-Image": _SMALL,
}


def comparisons(k: int) -> list[Comparison]:
    """Four ranked lists of k pictures."""
    return [
        Comparison(
            id=f"list-{i}",
            prompt=["a red fox", "red"][i % 2],
            media=tuple(picture(k * i + j, size=(40, 32)) for j in range(k)),
            score=tuple((j + i) % k / (k - 0.5) for j in range(k)),
            user=f"user-{i % 2}",
        )
        for i in range(4)
    ]
