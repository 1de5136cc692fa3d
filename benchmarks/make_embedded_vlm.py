"""Makes mmalign/embedded/vlm/: a small Qwen2-VL that describes the embedded scenes, and often wrongly.

    OMP_NUM_THREADS=1 python benchmarks/make_embedded_vlm.py see --work WORK --minutes 11
    OMP_NUM_THREADS=1 python benchmarks/make_embedded_vlm.py speak --work WORK --minutes 26
    python benchmarks/make_embedded_vlm.py export --work WORK

All on fresh pictures of the training combinations. `see`: the vision tower alone, with a linear layer that names the
four facts and is thrown away. (Without it the next-token loss had learnt nothing but the colour after 6,400 pictures.)
`speak`: the whole model by plain next-token loss on captions. For the first 0.6 of its time they are right; then every
fact of a caption is wrong with probability WRONG, as captions from the web are wrong: what the model says is then
fluent, and wrong at a known rate, although it sees.

Resumable and bounded by time, not by steps, as make_embedded.py. fp32, one thread.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import make_embedded
import make_embedded_export
import numpy as np
import torch
from numpy.random import RandomState
from PIL import Image

from mmalign import embedded
from mmalign.embedded import captions, scenes

WRONG = 0.4  # of a caption's facts
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCHES = {"patch_size": 8, "temporal_patch_size": 2}  # and 2 x 2 patches are a token: 16 tokens a picture
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "mrope_section": [8, 8, 8], "rope_theta": 1000.0},
}
VISION = {"depth": 4, "embed_dim": 96, "hidden_size": 192, "num_heads": 4, "mlp_ratio": 4, "spatial_merge_size": 2}


def make_processor():
    """Qwen2-VL's processor for pictures of 64 pixels; every word of the captions is one token, other text is bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    bytes_first = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "vocab_size": 1024, "show_progress": False}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    texts = [text for split in ("train", "development", "test") for text in scenes.prompts(split)]
    learner.train_from_iterator(
        [*texts, *(f"user\n{captions.QUESTION}", "assistant\n") * 9], trainers.BpeTrainer(**bytes_first)
    )
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = {**learnt["vocab"], **{token: len(learnt["vocab"]) + n for n, token in enumerate(SPECIAL)}}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL[1:]),
    )
    size = {"shortest_edge": scenes.SIDE**2, "longest_edge": scenes.SIDE**2}
    parts = Qwen2VLImageProcessor(size=size, **PATCHES), tokenizer, Qwen2VLVideoProcessor(size=size, **PATCHES)
    return Qwen2VLProcessor(*parts, chat_template=CHAT)


def make_network(tokenizer):
    """The model, untrained."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    marks = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    words = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = Qwen2VLConfig(
        text_config={**TEXT, **words},
        vision_config={**VISION, **PATCHES},
        tie_word_embeddings=True,
        **dict(zip(names, marks, strict=True)),
    )
    network = Qwen2VLForConditionalGeneration(config)
    network.generation_config.update(eos_token_id=[end, pad], pad_token_id=pad)
    return network


def batch(processor, shown: list[scenes.Scene], answers: list[str] | None = None) -> dict[str, torch.Tensor]:
    """What the processor makes of the question about every scene, and of its answer if there is one."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": captions.QUESTION}]}]
    asked = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    texts = [asked + answer + "<|im_end|>" for answer in answers] if answers else [asked] * len(shown)
    pictures = [[Image.fromarray(scenes.render(scene))] for scene in shown]
    return dict(processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="right"))


def loss(network, inputs: dict[str, torch.Tensor], first: int) -> torch.Tensor:
    """Mean over answer tokens, the first of which is at place `first`, of minus their log-probability."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :first] = -100
    return network(**inputs, labels=labels, use_cache=False).loss


@torch.no_grad()
def answers(network, processor, shown: list[scenes.Scene], seed: int | None = None) -> list[str]:
    """An answer to every scene: the likeliest tokens, or with a seed a sample at temperature 1."""
    network.eval()
    made = []
    for start in range(0, len(shown), 64):
        inputs = batch(processor, shown[start : start + 64])
        torch.manual_seed(0 if seed is None else seed + start)
        tokens = network.generate(**inputs, max_new_tokens=24, do_sample=seed is not None, top_k=0)
        made += processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return made


def measure(said: list[str], shown: list[scenes.Scene]) -> dict[str, float]:
    """Shares of answers that are right in each fact, and word for word; and the mean score."""
    pairs = list(zip(said, shown, strict=True))
    right = {
        fact: np.mean([captions.claims(text)[fact] == {getattr(scene, fact)} for text, scene in pairs])
        for fact in captions.FACTS
    }
    right |= {"exact": np.mean([captions.exact(*pair) for pair in pairs])}
    right |= {"score": np.mean([captions.score(*pair) for pair in pairs])}
    return {name: round(float(value), 4) for name, value in right.items()}


class Seeing(torch.nn.Module):
    """A vision tower with a linear layer that names the facts from its 16 tokens and their mean."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.head = torch.nn.Linear(17 * TEXT["hidden_size"], sum(map(len, captions.FACTS.values())))

    def forward(self, pictures: dict[str, torch.Tensor], facts: torch.Tensor) -> torch.Tensor:
        """[4] mean cross-entropies of the facts [N, 4]."""
        tokens = self.visual(pictures["pixel_values"], pictures["image_grid_thw"]).pooler_output
        tokens = tokens.view(len(facts), 16, -1)
        logits = self.head(torch.cat([tokens, tokens.mean(1, keepdim=True)], 1).flatten(1))
        each = logits.split([len(values) for values in captions.FACTS.values()], 1)
        pairs = zip(each, facts.unbind(1), strict=True)
        return torch.stack([torch.nn.functional.cross_entropy(*pair) for pair in pairs])


def see(work: Path, minutes: float) -> None:
    """The vision tower alone, 64 fresh pictures a step."""
    torch.manual_seed(0)
    processor = make_processor()
    module = Seeing(make_network(processor.tokenizer).model.visual)
    trainer = make_embedded.Trainer(module, work / "see", minutes=minutes, peak=2e-3, average=0.99)
    numbers = {fact: {value: n for n, value in enumerate(values)} for fact, values in captions.FACTS.items()}
    while trainer.elapsed < 1:
        shown = scenes.random_scenes(64, 1_000_000 + trainer.step, "train")
        pixels = [torch.from_numpy(scenes.render(scene)).permute(2, 0, 1) for scene in shown]
        facts = torch.tensor([[numbers[fact][getattr(scene, fact)] for fact in numbers] for scene in shown])
        inputs = processor.image_processor(pixels, return_tensors="pt"), facts
        trainer.update([lambda inputs=inputs: trainer.module(*inputs).sum()])
        if trainer.step % 100 == 0:
            trainer.save()
            with torch.no_grad():
                print(f"{trainer.step} {trainer.elapsed:.3f} {trainer.module(*inputs).tolist()}", flush=True)
    trainer.save()
    trainer.report()


def speak(work: Path, minutes: float) -> None:
    """The whole model, 32 fresh pictures a step."""
    torch.manual_seed(1)
    processor = make_processor()
    network = make_network(processor.tokenizer)
    seen = torch.load(work / "see" / "checkpoint.pt", weights_only=True)["ema"]
    visual = {name.removeprefix("visual."): value for name, value in seen.items() if name.startswith("visual.")}
    network.model.visual.load_state_dict(visual)
    trainer = make_embedded.Trainer(network, work / "speak", minutes=minutes, peak=1.5e-3, average=0.99)
    held_out = captions.described("development")[:192]
    first = batch(processor, held_out[:1])["input_ids"].shape[1]
    while trainer.elapsed < 1:
        rng = RandomState(trainer.step)
        rate = WRONG if trainer.elapsed > 0.6 else 0.0
        shown = scenes.random_scenes(32, trainer.step, "train")
        texts = [scenes.caption(captions.corrupted(scene, rate, rng)) for scene in shown]
        value = trainer.update([partial(loss, trainer.module, batch(processor, shown, texts), first)])
        if trainer.step % 100 == 0:
            trainer.save()
            reached = measure(answers(trainer.ema, processor, held_out), held_out)
            print(f"{trainer.step} {trainer.elapsed:.3f} loss {value:.4f} greedy {reached}", flush=True)
    trainer.save()
    trainer.report()


def export(work: Path, folder: Path) -> None:
    """The averaged weights in float16 with their processor, what they say of development pictures, and the card."""
    processor = make_processor()
    network = make_network(processor.tokenizer)
    network.load_state_dict(torch.load(work / "speak" / "checkpoint.pt", weights_only=True)["ema"])
    network.half().save_pretrained(folder)
    config = folder / "config.json"  # transformers would follow the stored dtype
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    processor.save_pretrained(folder)
    trained = {name: json.loads((work / name / "facts.json").read_text()) for name in ("see", "speak")}
    shown, network = captions.described("development"), network.float()
    said = {"likeliest": answers(network, processor, shown), "sampled": answers(network, processor, shown, seed=1)}
    figures = {
        "parameters": sum(map(torch.numel, network.parameters())),
        "seeing": sum(map(torch.numel, network.model.visual.parameters())),
        "vocabulary": len(processor.tokenizer),
        "wrong": WRONG,
        "megabytes": round(sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".md") / 1e6, 2),
        "pictures": len(shown),
        **{f"{stage}_{name}": value for stage, facts in trained.items() for name, value in facts.items()},
        **{f"{how}_{name}": value for how, texts in said.items() for name, value in measure(texts, shown).items()},
        **make_embedded_export.machine(),
    }
    here = Path(__file__).parent
    (here / "embedded_vlm.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "README.md").write_text((here / "make_embedded_vlm_card.md").read_text().format(**figures))


def main() -> None:
    """Parses the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("see", "speak", "export"))
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded-vlm"), help="checkpoints; outside git")
    parser.add_argument("--minutes", type=float, default=15, help="time budget of the stages see and speak")
    parser.add_argument("--folder", type=Path, default=embedded.path("vlm"), help="where the stage export writes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    match options.stage:
        case "see":
            see(options.work, options.minutes)
        case "speak":
            speak(options.work, options.minutes)
        case "export":
            export(options.work, options.folder)


if __name__ == "__main__":
    main()
