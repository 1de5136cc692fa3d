"""Draws the sprites of the embedded scenes and cuts the tokenizer; called by make_embedded.py.

The artwork is npm @iconify-json/fluent-emoji-flat 1.2.6 (Fluent Emoji by Microsoft, MIT), unpacked:
    npm pack @iconify-json/fluent-emoji-flat@1.2.6 && tar xzf iconify-json-fluent-emoji-flat-1.2.6.tgz
"""

import gzip
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmalign.embedded import scenes

ICONS = {  # where our noun is not the icon's name
    "dog": "dog-face", "cat": "cat-face", "fish": "tropical-fish", "rabbit": "rabbit-face", "pig": "pig-face",
    "bee": "honeybee", "ladybug": "lady-beetle", "whale": "spouting-whale", "dinosaur": "sauropod",
    "burger": "hamburger", "cake": "birthday-cake", "tree": "evergreen-tree", "car": "automobile",
    "boat": "sailboat", "plane": "airplane",
}  # fmt: skip
MERGES = 4096


def draw_sprites(icons_json: Path, out: Path = scenes.SPRITES) -> None:
    """Renders every noun at 128 pixels into one npz of uint8 [128, 128, 4]."""
    import resvg_py

    icons = json.loads(icons_json.read_text())["icons"]
    sprites = {}
    for noun in scenes.NOUNS:
        body = icons[ICONS.get(noun, noun)]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 32 32">{body}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128))
        sprites[noun] = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    np.savez_compressed(out, **sprites)


def cut_tokenizer():
    """The first 4,096 merges of CLIP's byte-pair encoding, as a CLIPTokenizer of 4,610 words."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]  # the first line is a comment
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)
