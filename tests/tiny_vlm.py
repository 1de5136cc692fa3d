"""Tiny random vision-language models in the folder layout of the published ones; byte tokens, pictures of few tokens.

The templates have the traits of the published ones that matter here: LLaVA's has no token at an answer's end and none
at the start, SmolVLM's puts a space before an answer that its generation prompt does not have, Gemma's has the bos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import bytes_to_unicode

from mmalign.records import Comparison, Text
from tests.conftest import picture

WIDTH = 16
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def chat(image: str, video: str = "", *, before="<|im_start|>", colon="\n", end="<|im_end|>\n") -> str:
    """A template of turns, each `before`, role, `colon`, parts, `end`."""
    return (
        f"{{% for m in messages %}}{before}{{{{ m['role'] }}}}{colon}{{% for part in m['content'] %}}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{before}assistant{colon.rstrip(' ')}{{% endif %}}"
    )


def byte_ids(*special: str) -> dict[str, int]:
    """Vocabulary of byte-level letters, and special tokens behind them."""
    return {symbol: number for number, symbol in enumerate([*bytes_to_unicode().values(), *special])}


def qwen_tokenizer(*special: str, **named: str) -> tuple[Any, dict[str, int]]:
    """Qwen2's tokenizer with all its letters and no merges; `named` become attributes too."""
    from transformers import Qwen2Tokenizer

    ids = byte_ids("<|endoftext|>", *special, *named.values())
    tokenizer = Qwen2Tokenizer(
        vocab=ids,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named or list(special),
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer, ids


def saved(make: Callable[[Any], Any], config: Any, processor: Any, folder: Path, end: int) -> Path:
    """Makes the model with weights that are a function of nothing else, and writes it with its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config)
        for parameter in model.parameters():  # as initialised the logits are all but equal
            if parameter.ndim > 1:
                parameter.data *= 4
    model.generation_config.update(eos_token_id=end)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen(folder: Path, version: str) -> Path:
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL; two frames and 28 pixels (32 with Qwen3-VL) make a token."""
    import transformers

    prefix = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    tokenizer, ids = qwen_tokenizer(*QWEN_SPECIAL)
    side = 32 if version == "3" else 28
    pixels = {"shortest_edge": side * side, "longest_edge": 4 * side * side}
    frames = {name: 4 * value for name, value in pixels.items()}
    patch = {"patch_size": 16} if version == "3" else {}
    images = transformers.Qwen2VLImageProcessor(size=pixels, **patch)
    maker = transformers.Qwen3VLVideoProcessor if version == "3" else transformers.Qwen2VLVideoProcessor
    # Qwen3-VL's template has no vision tokens around a video: its processor writes them around every frame
    template = chat(
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|video_pad|>" if version == "3" else "<|vision_start|><|video_pad|><|vision_end|>",
    )
    processor = getattr(transformers, f"{prefix}Processor")(
        images, tokenizer, maker(size=frames, **patch), chat_template=template
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "2": {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2},
        "2.5": {"hidden_size": 16, "out_hidden_size": WIDTH, "intermediate_size": 32, "fullatt_block_indexes": [1]},
        "3": {
            "hidden_size": 16,
            "out_hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }[version]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            **TEXT,
            "vocab_size": len(ids),
            "rope_parameters": rope,
            "head_dim": 8,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"depth": 2, "num_heads": 2, **vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return saved(
        getattr(transformers, f"{prefix}ForConditionalGeneration"), config, processor, folder, ids["<|im_end|>"]
    )


def llava(folder: Path) -> Path:
    """LLaVA 1.5: CLIP and Llama; four tokens a picture."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *map(chr, range(33, 127))]
    ids = {symbol: number for number, symbol in enumerate([*symbols, "<image>", "<pad>"])}
    tokenizer = LlamaTokenizer(
        vocab=ids, merges=[], pad_token="<pad>", add_bos_token=True, extra_special_tokens={"image_token": "<image>"}
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n", before="", colon=": ", end=" "),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(ids), pad_token_id=ids["<pad>"]),
        image_token_index=ids["<image>"],
        image_seq_length=4,
    )
    return saved(LlavaForConditionalGeneration, config, processor, folder, ids["</s>"])


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: SigLIP and Qwen2; tiles of 28 pixels, a frame is a token."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer, ids = qwen_tokenizer("<|im_start|>", "<|im_end|>", "<image>", "<video>")
    size, tiles = {"height": 28, "width": 28}, [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        # The published one writes an answer's turn in another way than what the answer is asked for by
        chat_template=chat("<image>", "<video>", colon=" \n").replace("assistant \n", "assistant\n"),
    )
    text = Qwen2Config(
        **TEXT,
        vocab_size=len(ids),
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=tiles,
    )
    return saved(LlavaOnevisionForConditionalGeneration, config, processor, folder, ids["<|im_end|>"])


def smolvlm(folder: Path, prefix: str = "SmolVLM") -> Path:
    """SmolVLM or Idefics3: SigLIP and Llama; tiles of 28 pixels, four tokens each, and what stands around them."""
    import transformers
    from transformers import GPT2Tokenizer, LlamaConfig
    from transformers.models.smolvlm import processing_smolvlm

    # Of a video's prompt "four frames"; without the package the processor cannot even be made
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    rows = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    named = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    ids = byte_ids("<|endoftext|>", "<|im_start|>", *named.values(), *rows)
    tokenizer = GPT2Tokenizer(
        vocab=ids,
        merges=[],
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=named,
    )
    tokenizer.add_tokens(rows, special_tokens=True)
    limits: dict[str, Any] = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    tools = [getattr(transformers, f"{prefix}ImageProcessor")(**limits), tokenizer]
    if prefix == "SmolVLM":
        tools.append(transformers.SmolVLMVideoProcessor(**limits))
    template = "<|im_start|>" + chat("<image>", before="", colon=": ", end="<end_of_utterance>\n")
    processor = getattr(transformers, f"{prefix}Processor")(*tools, image_seq_len=4, chat_template=template)
    end, pad = ids["<end_of_utterance>"], ids["<|endoftext|>"]
    text = LlamaConfig(
        **TEXT, vocab_size=len(ids), bos_token_id=ids["<|im_start|>"], eos_token_id=end, pad_token_id=pad
    )
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**VISION, "patch_size": 7},
        text_config=text,
        image_token_id=ids["<image>"],
        pad_token_id=pad,
        scale_factor=2,
    )
    return saved(getattr(transformers, f"{prefix}ForConditionalGeneration"), config, processor, folder, end)


def internvl(folder: Path) -> Path:
    """InternVL 3: its own tower and Qwen2; tiles of 28 pixels, a token each."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    tokenizer, ids = qwen_tokenizer(
        "<|im_start|>",
        "<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": 28, "width": 28}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=1,
        chat_template=chat("<IMG_CONTEXT>\n", "<video>\n"),
    )
    text = Qwen2Config(
        **TEXT,
        vocab_size=len(ids),
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    vision = {**VISION, "image_size": (28, 28), "patch_size": (14, 14)}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=text,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    return saved(InternVLForConditionalGeneration, config, processor, folder, ids["<|im_end|>"])


def gemma3(folder: Path) -> Path:
    """Gemma 3: SigLIP and Gemma; four tokens a picture, which see each other."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        GemmaTokenizer,
        SiglipVisionConfig,
    )

    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    ids = {
        symbol: number
        for number, symbol in enumerate([*symbols, "▁", *map(chr, range(33, 127)), *named.values(), *turns])
    }
    tokenizer = GemmaTokenizer(vocab=ids, merges=[], extra_special_tokens=named, add_bos_token=True)
    tokenizer.add_tokens(turns, special_tokens=True)
    template = "{{ bos_token }}" + chat("<start_of_image>", before=turns[0], end="<end_of_turn>\n")
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4, chat_template=template
    )
    layers = ["sliding_attention", "full_attention"]
    text = Gemma3TextConfig(
        **TEXT, vocab_size=len(ids), head_dim=8, sliding_window=16, query_pre_attn_scalar=8, layer_types=layers
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**{**VISION, "patch_size": 7}, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    return saved(Gemma3ForConditionalGeneration, config, processor, folder, ids["<end_of_turn>"])


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "Qwen2-VL": lambda folder: qwen(folder, "2"),
    "Qwen2.5-VL": lambda folder: qwen(folder, "2.5"),
    "LLaVA 1.5": llava,
    "LLaVA-OneVision": llava_onevision,
    "SmolVLM": smolvlm,
    "Idefics3": lambda folder: smolvlm(folder, "Idefics3"),
    "Qwen3-VL": lambda folder: qwen(folder, "3"),
    "InternVL": internvl,
    "Gemma 3": gemma3,
}
VIDEO = ("Qwen2-VL", "Qwen2.5-VL", "LLaVA-OneVision", "SmolVLM", "Qwen3-VL", "InternVL")  # those that take videos
SETTINGS: dict[str, dict[str, Any]] = {name: {"max_new_tokens": 6} for name in FAMILIES}


def comparisons(k: int = 2) -> list[Comparison]:
    """Four comparisons of k answers, about one picture, two, none and one."""
    shown = [(picture(1),), (picture(2, (60, 30)), picture(3)), None, (picture(4, (28, 90)),)]
    questions = ["What is it?", "Which of these two is the fox, and why?", "Hm", "Count."]
    answers = ["A red fox.", "no", "The first: it is red", "yes", "one two three", "1", "Neither one is"]
    return [
        Comparison(
            id=f"answers {i}",
            prompt=questions[i],
            media=tuple(Text(f"{answers[(i + 2 * j) % len(answers)]}{'!' * (j // 3)}") for j in range(k)),
            score=tuple((j + i) % k / (k + 0.5) for j in range(k)),
            user=f"user-{i % 2}",
            condition=shown[i],
        )
        for i in range(4)
    ]
