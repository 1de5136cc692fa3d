"""Tiny video models in the real pipelines' layouts, and videos to compare; random weights, a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mmalign.media import make_video
from mmalign.records import Comparison, Video
from tests.conftest import picture
from tests.tiny import t5_tokenizer

FPS = 16


def wan_transformer(num_attention_heads: int = 2, channels: int = 4):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=num_attention_heads,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def tiny_wan(folder: Path, seed: int = 0, **settings) -> Path:
    """Saves a WanPipeline of about 60 thousand parameters: eight pixels and four frames a latent, as the real one.

    Its own clip is the real one's, 81 frames of 832 x 480, as nothing in the folder tells: give it a size.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = t5_tokenizer()
        reader = UMT5Config(vocab_size=symbols, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[-0.4, 0.1, 0.3, -0.2],
            latents_std=[0.5, 1.5, 2.0, 0.8],
        )
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        )
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(reader),
            vae=vae,
            scheduler=scheduler,
            transformer=wan_transformer(),
            **settings,
        ).save_pretrained(folder)
    return folder


def cogvideox_transformer(*, rotary: bool = False, num_attention_heads: int = 2):
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=2,
        sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )


def tiny_cogvideox(folder: Path, *, rotary: bool = False, seed: int = 0) -> Path:
    """Saves a CogVideoXPipeline of about 90 thousand parameters, as 2b or, with `rotary`, as 5b; clips of 32 x 16."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, symbols = t5_tokenizer()
        reader = T5Config(vocab_size=symbols, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            scaling_factor=0.7 if rotary else 1.15258426,
        )
        scheduler = CogVideoXDDIMScheduler(  # of both; 5b has another shift
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0 if rotary else 3.0,
            timestep_spacing="trailing",
        )
        CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(reader),
            vae=vae,
            transformer=cogvideox_transformer(rotary=rotary),
            scheduler=scheduler,
        ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Wan 2.1": tiny_wan,
    "CogVideoX 2b": tiny_cogvideox,
    "CogVideoX 5b": lambda folder: tiny_cogvideox(folder, rotary=True),
}
RUN = {"resolution": 16, "num_frames": 9}  # of a Run: the least that all of them take
SETTINGS: dict[str, dict] = {
    name: {"num_inference_steps": 2, "guidance_scale": 3.0, "num_frames": 9, "height": 16, "width": 32}
    for name in FAMILIES
}


def video(seed: int, count: int = 20, size=(40, 24), fps: float = FPS) -> Video:
    """A blob of colours that moves on, by a pixel a frame; 20 frames are 1.25 seconds."""
    wide = picture(seed, size=(size[0] + count, size[1]))
    return make_video([wide.crop((n, 0, n + size[0], size[1])) for n in range(count)], fps)


def comparisons(k: int) -> list[Comparison]:
    """Four ranked lists of k videos, of two users."""
    return [
        Comparison(
            id=f"list-{i}",
            prompt=["a red fox", "red"][i % 2],
            media=tuple(video(k * i + j) for j in range(k)),
            score=tuple((j + i) % k / (k - 0.5) for j in range(k)),
            user=f"user-{i % 2}",
        )
        for i in range(4)
    ]
