"""Tiny models in the real layouts, built here from configurations; random weights, a second each."""

from __future__ import annotations

import json
from pathlib import Path

import torch

MERGES = [("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]


def write_tokenizer(folder: Path):
    """A CLIP tokenizer with single letters and four merges."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    return tokenizer, len(symbols)


def text_config(vocabulary: int, width: int, projection: int | None):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def unet_config(*, xl: bool, sample_size: int = 8):
    shared = {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24 if xl else 8,
    }
    if xl:
        shared |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 16,
            "use_linear_projection": True,
        }
    return shared


def tiny_vae(levels: int = 2, **settings):
    """Two pixels a latent, or with more levels more."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **settings,
    )


def tiny_pipeline(folder: Path, *, xl: bool, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Saves a StableDiffusion(XL)Pipeline of about 60 thousand parameters; pictures of 16 pixels."""
    from diffusers import (
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, vocabulary = write_tokenizer(folder / "tokenizer")
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        vae = tiny_vae(latent_channels=4, scaling_factor=0.7)
        parts = {
            "unet": UNet2DConditionModel(**unet_config(xl=xl)),
            "vae": vae,
            "scheduler": scheduler,
            "tokenizer": tokenizer,
            "text_encoder": CLIPTextModel(text_config(vocabulary, 8, None)),
        }
        if xl:
            parts["tokenizer_2"] = tokenizer
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(vocabulary, 16, 16))
            pipeline = StableDiffusionXLPipeline(**parts)
        else:
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        pipeline.save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_vlm(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Saves a Qwen2-VL of about 60 thousand parameters with byte tokens; pictures of 28 pixels a token."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    letters = list(bytes_to_unicode().values())
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    ids = {symbol: number for number, symbol in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=ids,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=special[1:],
    )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels), tokenizer, Qwen2VLVideoProcessor(size=pixels), chat_template=CHAT
    )
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
        for parameter in model.parameters():  # as initialised the logits are all but equal
            if parameter.ndim > 1:
                parameter.data *= 4
        # As in the real folder, but stronger: none of it may reach what we sample
        model.generation_config.update(
            do_sample=True,
            temperature=0.01,
            top_k=1,
            top_p=0.001,
            repetition_penalty=2.0,
            eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        )
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def t5_tokenizer():
    """A T5 tokenizer of single letters, as its Unigram model wants them: symbol and log-probability."""
    from transformers import T5TokenizerFast

    symbols = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[(symbol, -float(i)) for i, symbol in enumerate(symbols)], extra_ids=0), len(symbols)


def sd3_transformer(num_attention_heads: int = 2):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=num_attention_heads,
        caption_projection_dim=8 * num_attention_heads,
        joint_attention_dim=24,
        pooled_projection_dim=8 + 12,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )


def tiny_sd3(folder: Path, *, t5: bool = True, seed: int = 0) -> Path:
    """Saves a StableDiffusion3Pipeline of about 40 thousand parameters, with or without T5; pictures of 16 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, vocabulary = write_tokenizer(folder / "tokenizer")
        third, symbols = t5_tokenizer()
        reader = T5Config(vocab_size=symbols, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        vae = tiny_vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        StableDiffusion3Pipeline(
            transformer=sd3_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=CLIPTextModelWithProjection(text_config(vocabulary, 8, 8)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config(vocabulary, 12, 12)),
            tokenizer_2=tokenizer,
            text_encoder_3=T5EncoderModel(reader) if t5 else None,
            tokenizer_3=third if t5 else None,
        ).save_pretrained(folder)
    return folder


def tiny_video_vlm(folder: Path, seed: int = 0, **settings) -> Path:
    """`tiny_vlm` whose chat template shows videos too."""
    tiny_vlm(folder, seed, **settings)
    image = "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    (folder / "chat_template.jinja").write_text(
        CHAT.replace(image, image + "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>")
    )
    return folder
