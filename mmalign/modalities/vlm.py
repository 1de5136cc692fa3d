"""Qwen2-VL, and with a row in the families' table other vision-language models, through transformers' Auto classes.

A token model has no noise: the likelihood of an answer is the sum of its tokens' log-probabilities, and Diffusion-DPO
on it is DPO.

Shapes: N samples, L tokens of the longest (padded on the right), K positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.modalities import Encoded, Holder, Only, Piece, Skeleton
from mmalign.modalities.adapter_files import load_adapter, save_adapter
from mmalign.modalities.soft_tokens import add_soft_tokens, hiding, told
from mmalign.modalities.user import has_layers, layers, save_layers
from mmalign.records import Comparison, Text, UserError, open_image
from mmalign.surrogate.draws import generator
from mmalign.surrogate.likelihood import Cond

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PLANNED_TOKENS = 1024  # what the memory plan takes a sample to be: a picture of 448 x 448 is 256 of them


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    vae: str | Path | None = None,
    only: Only = None,
) -> VLMModality:
    """Loads a vision-language model with its processor.

    Args:
        source: folder or hub id with config.json, weights, processor, tokenizer and chat template.
        lora: PEFT adapter to put on as the policy's.
        dtype: of the weights; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        vae: must be None; a recipe may give one for other families.
        only: see `mmalign.load`; the processor, which a saved model needs too, is always there.

    Raises:
        UserError: a part is missing or does not fit, or there is no chat template.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    if vae:
        raise UserError(f"{source}: a vision-language model has no VAE; leave that setting out.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type != "cpu" else torch.float32)
    try:
        processor = AutoProcessor.from_pretrained(str(source))
        if only == "encoders":
            network = skeleton(source).parts["network"]
            network.generation_config = GenerationConfig.from_pretrained(str(source))
        else:
            network = AutoModelForImageTextToText.from_pretrained(str(source), dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"{source}: cannot be loaded ({str(error).strip().splitlines()[0]}).") from error
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{source}: has no chat template, which says where a question ends; add chat_template.jinja.")
    modality = VLMModality(network, processor, str(source))
    if lora:
        modality.load_adapter(lora)
    return modality


def skeleton(source: str | Path) -> Skeleton:
    """The whole model on the meta device: shapes without memory, for the memory plan.

    A sample is planned as `PLANNED_TOKENS` tokens, half of them the answer's, as data are not yet known; a picture's
    tokens count as text. The vision tower, which keeps nothing for backward while it is frozen, is not run.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(str(source)))

    def example(
        samples: int, resolution: int | None, dtype: torch.dtype, length: float | None = None
    ) -> dict[str, Any]:
        tokens = torch.zeros(samples, PLANNED_TOKENS, dtype=torch.int64)
        return {"input_ids": tokens, "use_cache": False, "logits_to_keep": PLANNED_TOKENS // 2}

    return Skeleton({"network": network}, example, tuple(text_projections(network)))


def text_projections(model: Any) -> list[str]:
    """The attention projections of the text decoder; by their short names where the vision tower has none so called."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    named = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    inside = [name for name, module in named if id(module) in decoder]
    return list(PROJECTIONS) if len(inside) == len(named) else inside


class VLMModality(Holder):
    """A vision-language model as the trainer sees it.

    A Comparison's `prompt` is the user's turn, its `condition` the pictures shown before it, its media K `Text`
    answers.

    Attributes:
        path: None, as there is no noise.
        medium: what it makes, in a word.
        processor: makes tokens and patches.
        ends: ids of the tokens that end an answer.
    """

    path = None
    medium = "answer"

    def __init__(self, network: Any, processor: Any, source: str = "") -> None:
        self.network: nn.Module = network.requires_grad_(False).eval()
        self.processor, self.source = processor, source
        end = getattr(network.generation_config, "eos_token_id", None)
        ends = end if isinstance(end, list) else [end]
        self.ends = {token for token in (*ends, processor.tokenizer.eos_token_id) if token is not None}
        self._end_of_turn = self._find_end_of_turn()

    @property
    def resolution(self) -> int:
        """Not of this family: the processor's own limits say how large a picture may be.

        Raises:
            UserError: when it is set.
        """
        return 0

    @resolution.setter
    def resolution(self, value: int) -> None:
        raise UserError(f"resolution is {value}, but a vision-language model's processor sizes pictures; leave it out.")

    # -- encoding ------------------------------------------------------------------------------------------

    def encode_prompts(self, items: Sequence[Comparison]) -> list[Piece]:
        """The processor's output for everything up to where the answer begins; its placeholders are expanded.

        Raises:
            UserError: a picture cannot be read, or a prompt has special tokens in it.
        """
        made: list[Piece] = []
        for item in items:
            where = f"comparison {item.id!r}"
            pictures = [
                open_image(one, name=f"{where}, input picture {n}") for n, one in enumerate(item.condition or ())
            ]
            made.append(self._prompt(item.prompt, pictures, where))
        return made

    def encode_media(self, members: Sequence[tuple[Comparison, int]]) -> list[Piece]:
        """An answer's tokens, "answer" [L], with the token that ends the turn.

        An answer is tokenized by itself, so the mask is exact, and the tokens are those that the model itself would
        have continued with.

        Raises:
            UserError: a medium is no `Text`, or has special tokens in it.
        """
        made: list[Piece] = []
        for item, number in members:
            answer = item.media[number]
            if not isinstance(answer, Text):
                raise UserError(
                    f"comparison {item.id!r}: medium {number} is no text; {self.source} learns from text answers."
                )
            tokens = self._tokens(answer, f"comparison {item.id!r}, answer {number}")
            made.append({"answer": torch.tensor(tokens + self._end_of_turn)})
        return made

    def assemble(self, prompts: Sequence[Piece], media: Sequence[Sequence[Piece]]) -> Encoded:
        """Tokens of prompt and answer, one row an answer, comparison by comparison.

        Returns:
            x0 [N, L] int64, padded on the right; no x0_std; cond with `answer_mask` [N, L] bool, what the processor
            gave for every token ([N, L]: `attention_mask`, `mm_token_type_ids`), and lists of N for the rest
            (`pixel_values`, `image_grid_thw`; None for a row without pictures).
        """
        pairs = zip(prompts, media, strict=True)
        return Encoded.cat([self._row(prompt, answer["answer"]) for prompt, answers in pairs for answer in answers])

    def _prompt(self, text: str, pictures: list[Any], where: str) -> dict[str, Tensor]:
        """The processor's output for everything up to where the answer begins."""
        self._check(text, where)
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        rendered = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        shown = {"images": [pictures]} if pictures else {}
        return dict(self.processor(text=[rendered], return_tensors="pt", **shown))

    def _tokens(self, answer: str, where: str) -> list[int]:
        self._check(answer, where)
        return self.processor.tokenizer(answer, add_special_tokens=False).input_ids

    def _check(self, text: str, where: str) -> None:
        """Text with control tokens in it would end turns or ask for pictures that are not there."""
        for token in self.processor.tokenizer.all_special_tokens:
            if token in text:
                raise UserError(f"{where}: its text holds the special token {token}; remove it.")

    def _find_end_of_turn(self) -> list[int]:
        """What the chat template writes after an answer, up to the token that ends the turn."""
        tokenizer, mark = self.processor.tokenizer, "ANSWER"
        turns = [
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": mark}]},
        ]
        after = self.processor.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
        ids = tokenizer(after, add_special_tokens=False).input_ids
        ending = next((n for n, token in enumerate(ids) if token in self.ends), None)
        return [tokenizer.eos_token_id] if ending is None else ids[: ending + 1]

    def _row(self, prompt: Piece, answer: Tensor) -> Encoded:
        """One sample; entries that go along the tokens are extended as for text: attended to, and no picture."""
        asked = prompt["input_ids"]
        added = answer[None].to(asked.dtype)
        entries: dict[str, Any] = {
            "answer_mask": torch.cat([torch.zeros_like(asked), torch.ones_like(added)], 1).bool()
        }
        for name in self.processor.model_input_names:
            value = prompt.get(name)
            if value is None or value.shape != asked.shape:
                entries[name] = [value]  # ragged; named even when absent, so that batches can be joined
            else:
                more = torch.ones_like(added) if name == "attention_mask" else torch.zeros_like(added)
                entries[name] = torch.cat([value, more], 1).to(self.device)
        entries.pop("input_ids")
        entries["answer_mask"] = entries["answer_mask"].to(self.device)
        return Encoded(torch.cat([asked, added], 1).to(self.device), None, Cond(entries))

    def empty(self) -> Cond:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError("A token model has no empty prompt, so caption dropout cannot be; set it to 0.")

    # -- the network ---------------------------------------------------------------------------------------

    def predict(self, probe: Any, view: str) -> Tensor:
        """[N, K, V] logits of the last K <= L positions, the first of which predicts the first answer token.

        The only call of the trained network. Logits are what takes memory: N · K · V numbers, V being 152 thousand for
        Qwen2-VL, and once more in float32; so those of the prompt are not made. `backward="two-pass"` makes N 1.
        """
        first = int(probe.mask.any(0).int().argmax())
        cond = probe.cond.view(view)
        with told(self.unwrapped, cond.get("user")):
            inputs = self._inputs(probe.tokens, cond)
            return self.network(**inputs, use_cache=False, logits_to_keep=probe.tokens.shape[1] - first + 1).logits

    def _inputs(self, tokens: Tensor, cond: Cond) -> dict[str, Any]:
        """The network's arguments for N rows."""
        inputs: dict[str, Any] = {"input_ids": tokens}
        for name, value in cond.to(self.device, self.unwrapped.dtype).items():
            if isinstance(value, list):
                # Patches and grids of all pictures stand behind each other, in the rows' order
                given = [one for one in value if one is not None]
                inputs |= {name: torch.cat(given)} if given else {}
            elif name not in ("answer_mask", "user"):
                inputs[name] = value
        return inputs

    def lora_targets(self) -> list[str]:
        """The attention projections of the text decoder; the vision tower stays as it is."""
        return text_projections(self.unwrapped)

    def add_user_layers(self, features: int, tokens: int, seed: int = 0) -> dict[str, nn.Parameter]:
        """Puts untrained soft tokens on the network, which start at 0 whatever the seed, and returns their map."""
        add_soft_tokens(self.unwrapped, features, tokens)
        return layers(self.unwrapped)

    # -- generation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        images: Sequence[Sequence[Any]] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        user: Tensor | None = None,
        starts: Sequence[str] | None = None,
        hidden: Sequence[Callable[[int], Any]] | None = None,
        stop: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Text]:
        """Answers, one a prompt; answer i is a function of `seeds[i]` and its own prompt.

        Args:
            prompts: the user's turns.
            seeds: one a prompt.
            images: for every prompt the pictures shown before it, things that `open_image` takes.
            max_new_tokens: an answer is cut after so many.
            temperature: divides the logits; 0 takes the likeliest token.
            user: whom they are for, an embedding [D] or [N, D]; it needs user layers.
            starts: for every prompt how the answer begins; it is continued, and stands in what comes back.
            hidden: for every prompt which of its pictures' tokens nothing attends to, their number -> that many bools.
            stop: a text, such as a full stop, after which an answer ends as well.
            progress: is told how many answers were finished, one after the other.

        Raises:
            ValueError: lengths differ.
            UserError: as in `encode`.
        """
        images = images or [()] * len(prompts)
        if not len(prompts) == len(seeds) == len(images):
            raise ValueError(
                f"{len(prompts)} prompts, {len(seeds)} seeds, {len(images)} images: give one of each a prompt"
            )
        whose = [None] * len(prompts) if user is None else user.to(self.device).expand(len(prompts), -1).split(1)
        training = self.network.training
        self.network.eval()
        answers: list[Text] = []
        try:
            for number, (text, seed, shown) in enumerate(zip(prompts, seeds, images, strict=True)):
                pictures = [open_image(one, name=f"prompt {number}, picture {n}") for n, one in enumerate(shown)]
                prompt = self._prompt(text, pictures, f"prompt {number}")
                begun = self._tokens(starts[number] if starts else "", f"prompt {number}, its answer's start")
                row = self._row(prompt, torch.tensor(begun, dtype=torch.int64))
                off = self._picture_tokens(row.x0[0], hidden[number]) if hidden else None
                with told(self.unwrapped, whose[number]), hiding(self.unwrapped, off):
                    tokens = self._continue(row, int(seed), max_new_tokens, temperature, stop)
                new = tokens[prompt["input_ids"].shape[1] :]
                answers.append(Text(self.processor.tokenizer.decode(new, skip_special_tokens=True)))
                if progress:
                    progress(1)
        finally:
            self.network.train(training)
        return answers

    def _picture_tokens(self, tokens: Tensor, chosen: Callable[[int], Any]) -> Tensor:
        """[L] bool, true for those of a row's picture tokens that are chosen."""
        places = torch.nonzero(tokens == self.unwrapped.config.image_token_id).squeeze(1)
        found = torch.zeros_like(tokens, dtype=torch.bool)
        found[places] = torch.as_tensor(chosen(len(places)), device=tokens.device)
        return found

    def _continue(self, row: Encoded, seed: int, max_new_tokens: int, temperature: float, stop: str | None) -> Tensor:
        """The tokens of one row and of what follows [L]."""
        from transformers import GenerationConfig, LogitsProcessorList

        def noised(tokens: Tensor, scores: Tensor) -> Tensor:
            """The largest of logits plus Gumbel noise is a sample of the softmax: no global random state."""
            noise = generator("answer", seed, tokens.shape[1]).gumbel(size=scores.shape[1:])
            return scores.double() / temperature + torch.from_numpy(noise).to(scores.device)

        # The folder's own sampling settings stay out: they would change the distribution that is trained
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 50},  # of no effect; transformers warns of the folder's
            eos_token_id=sorted(self.ends),
            pad_token_id=min(self.ends),
        )
        processors = LogitsProcessorList([noised] if temperature else [])  # pyright: ignore[reportArgumentType]
        ends = {"stop_strings": stop, "tokenizer": self.processor.tokenizer} if stop else {}
        inputs = self._inputs(row.x0, row.cond)
        return self.unwrapped.generate(**inputs, generation_config=config, logits_processor=processors, **ends)[0]

    # -- files ---------------------------------------------------------------------------------------------

    def load_adapter(self, path: str | Path, name: str = "policy") -> None:
        """Puts a LoRA in PEFT's format on the network.

        Raises:
            UserError: the files are missing, hold no LoRA, or were made for another architecture.
        """
        load_adapter(self.unwrapped, path, name, self.source)

    def save(self, folder: str | Path) -> None:
        """Writes user layers and the adapter as PEFT reads it; without either the whole model with its processor."""
        folder = Path(folder)
        personal = has_layers(self.unwrapped)
        if personal:
            save_layers(self.unwrapped, folder)
        if "policy" in getattr(self.unwrapped, "peft_config", {}):
            save_adapter(self.unwrapped, folder, self.source)
        elif not personal:
            self.unwrapped.save_pretrained(folder)
            self.processor.save_pretrained(folder)
