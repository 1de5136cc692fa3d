"""Vision-language models through transformers' Auto classes: a family is a row in the families' table.

A token model has no noise: the likelihood of an answer is the sum of its tokens' log-probabilities, and Diffusion-DPO
on it is DPO. What differs between families is asked of their processors: the names of what the network is given, the
size of a picture, the template of a conversation.

Shapes: N samples, L tokens of the longest (padded on the right), K positions asked for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.media import Frames, frames_of
from mmalign.modalities import Encoded, Holder, Only, Piece, Skeleton
from mmalign.modalities.adapter_files import load_adapter, save_adapter
from mmalign.modalities.soft_tokens import add_soft_tokens, hiding, told
from mmalign.modalities.user import has_layers, layers, save_layers
from mmalign.records import Comparison, Text, UserError, Video, open_image
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
        processor = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
        if only == "encoders":
            network = skeleton(source).parts["network"]
            network.generation_config = GenerationConfig.from_pretrained(str(source))
        else:
            network = AutoModelForImageTextToText.from_pretrained(str(source), dtype=dtype, trust_remote_code=False)
            network = network.to(device)
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
        network = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(str(source), trust_remote_code=False)
        )

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


def _times(clip: Frames) -> dict[str, Any]:
    """When the frames are shown, as processors are told."""
    count, fps = len(clip), clip.fps or 1.0
    return {"total_num_frames": count, "fps": fps, "duration": count / fps, "frames_indices": list(range(count))}


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Patches, grids or tiles of all rows behind each other.

    Where pictures have other numbers of tiles, zeros are added: LLaVA-OneVision counts tiles by the pictures' sizes,
    Idefics3 and SmolVLM leave out those that are zero.
    """
    most = [max(sizes) for sizes in zip(*(one.shape[:0:-1] for one in values), strict=True)]  # the last one's first

    def padded(one: Tensor) -> Tensor:
        return F.pad(one, [n for size, wanted in zip(one.shape[:0:-1], most, strict=True) for n in (0, wanted - size)])

    return torch.cat([padded(one) for one in values])


class VLMModality(Holder):
    """A vision-language model as the trainer sees it.

    A Comparison's `prompt` is the user's turn, its `condition` what is shown before it: pictures and `Video`s (or
    lists of pictures, their frames). Its media are K `Text` answers.

    Attributes:
        path: None, as there is no noise.
        medium: what it makes, in a word.
        processor: makes tokens and patches.
        ends: ids of the tokens that end an answer.
        video_fps: frames of a video that are shown, a second.
        max_frames: so many at most, then further apart.
    """

    path = None
    medium = "answer"
    video_fps = 2.0
    max_frames = 32

    def __init__(self, network: Any, processor: Any, source: str = "") -> None:
        self.network: nn.Module = network.requires_grad_(False).eval()
        self.processor, self.source = processor, source
        end = getattr(network.generation_config, "eos_token_id", None)
        ends = end if isinstance(end, list) else [end]
        self.ends = {token for token in (*ends, processor.tokenizer.eos_token_id) if token is not None}
        special = [str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
        self._control = [*processor.tokenizer.all_special_tokens, *processor.all_special_multimodal_tokens, *special]
        self._lead, self._end_of_turn = self._read_template()

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
            UserError: a picture or video cannot be read or is nothing for this model, a prompt has special tokens in
                it, or is too long.
        """
        return [self._prompt(item.prompt, item.condition or (), f"comparison {item.id!r}") for item in items]

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

        Raises:
            UserError: a row is longer than the network takes; nothing is cut.
        """
        pairs = zip(prompts, media, strict=True)
        return Encoded.cat([self._row(prompt, answer["answer"]) for prompt, answers in pairs for answer in answers])

    def _prompt(self, text: str, shown: Sequence[Any], where: str) -> dict[str, Tensor]:
        """The processor's output for everything up to where the answer begins."""
        self._check(text, where)
        kinds = ["video" if isinstance(one, Video | list | tuple) else "image" for one in shown]
        pictures, clips = [], []
        for n, (one, kind) in enumerate(zip(shown, kinds, strict=True)):
            if kind == "image":
                pictures.append(open_image(one, name=f"{where}, input picture {n}"))
            else:
                clips.append(frames_of(one, self.video_fps, most=self.max_frames, name=f"{where}, input video {n}"))
        settings: dict[str, Any] = {"images": [pictures]} if pictures else {}
        if clips:
            self._check_video(bool(pictures), where)
            times = [_times(clip) for clip in clips]
            settings |= {"videos": [clips], "video_metadata": times, "do_sample_frames": False}
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        rendered = self._rendered({"role": "user", "content": content}, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        if bos and rendered.startswith(bos):  # Gemma's template has it already
            settings["add_special_tokens"] = False
        try:
            made = dict(self.processor(text=[rendered], return_tensors="pt", **settings))
        except ValueError as error:  # placeholders that the template did not write, a picture too narrow ...
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(f"{where}: {self.source}'s processor or chat template refuses it ({reason}).") from error
        self._check_length(made["input_ids"].shape[1], f"{where}: its prompt with all that is shown")
        return made

    def _check_video(self, pictures: bool, where: str) -> None:
        reader, images = getattr(self.processor, "video_processor", None), self.processor.image_processor
        if reader is None:
            raise UserError(f"{where}: shows a video, but {self.source} takes pictures alone; show frames as pictures.")
        if pictures and {*reader.model_input_names} & {*images.model_input_names}:  # SmolVLM's loses one of the two
            raise UserError(f"{where}: shows pictures and a video, but {self.source} takes one of the two at a time.")

    def _tokens(self, answer: str, where: str) -> list[int]:
        self._check(answer, where)
        return self._ids(self._lead + answer) if answer else []

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False).input_ids

    def _check(self, text: str, where: str) -> None:
        """Text with control tokens in it would end turns or ask for pictures that are not there."""
        for token in self._control:
            if token in text:
                raise UserError(f"{where}: its text holds the special token {token}; remove it.")

    def _check_length(self, length: int, what: str) -> None:
        most = getattr(self.unwrapped.config.get_text_config(), "max_position_embeddings", length)
        if length > most:
            raise UserError(f"{what} is {length} tokens, but {self.source} takes {most}; show less or write less.")

    def _rendered(self, *turns: dict[str, Any], **settings: Any) -> str:
        return self.processor.apply_chat_template(list(turns), tokenize=False, **settings)

    def _read_template(self) -> tuple[str, list[int]]:
        """What the chat template writes before an answer, and after it up to the token that ends the turn.

        SmolVLM's asks with "Assistant:" and writes "Assistant: answer", so the network itself begins with the space;
        tokenizers of Llama's kind put it there.
        """
        mark = "ANSWER"
        question: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
        asked = self._rendered(question, add_generation_prompt=True)
        before, _, after = self._rendered(question, answer).rpartition(mark)
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if self._ids(asked) + self._ids(lead + mark) != self._ids(before + mark):
            lead = ""
        ids = self._ids(after)
        ending = next((n for n, token in enumerate(ids) if token in self.ends), None)
        return lead, [self.processor.tokenizer.eos_token_id] if ending is None else ids[: ending + 1]

    def _row(self, prompt: Piece, answer: Tensor) -> Encoded:
        """One sample; entries that go along the tokens are extended as for text: attended to, and no picture."""
        asked = prompt["input_ids"]
        self._check_length(asked.shape[1] + len(answer), f"A prompt of {asked.shape[1]} tokens with its answer")
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
        keep = probe.tokens.shape[1] - int(probe.mask.any(0).int().argmax()) + 1
        shapes = [None if clip is None else clip.shape[1:] for clip in probe.cond.get("pixel_values_videos", ())]
        if len({*shapes} - {None}) < 2:
            return self._logits(probe, view, keep)
        # LLaVA-OneVision stacks clips, so those of other lengths are asked about apart
        rows = [[n for n, shape in enumerate(shapes) if shape == one] for one in dict.fromkeys(shapes)]
        logits = torch.cat([self._logits(probe[part], view, keep) for part in rows])
        return logits[torch.tensor([n for part in rows for n in part]).argsort()]

    def _logits(self, probe: Any, view: str, keep: int) -> Tensor:
        cond = probe.cond.view(view)
        try:
            with told(self.unwrapped, cond.get("user")):
                return self.network(**self._inputs(probe.tokens, cond), use_cache=False, logits_to_keep=keep).logits
        except ValueError as error:
            if "do not match" not in str(error):  # placeholders and features
                raise
            raise UserError(f"{self.source}: its processor does not fit its network ({error}).") from error

    def _inputs(self, tokens: Tensor, cond: Cond) -> dict[str, Any]:
        """The network's arguments for N rows."""
        inputs: dict[str, Any] = {"input_ids": tokens}
        for name, value in cond.to(self.device).items():
            if isinstance(value, list):
                given = [one for one in value if one is not None]
                # Pixels alone: bfloat16 is too coarse for the seconds of Qwen2.5-VL
                dtype = self.unwrapped.dtype if "pixel_values" in name else None
                inputs |= {name: _joined(given).to(dtype=dtype)} if given else {}
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
            images: for every prompt what is shown before it, as in a Comparison's `condition`: videos too.
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
                prompt = self._prompt(text, shown, f"prompt {number}")
                begun = self._tokens(starts[number] if starts else "", f"prompt {number}, its answer's start")
                row = self._row(prompt, torch.tensor(begun, dtype=torch.int64))
                off = self._picture_tokens(row.x0[0], hidden[number]) if hidden else None
                with told(self.unwrapped, whose[number]), hiding(self.unwrapped, off):
                    tokens = self._continue(row, int(seed), max_new_tokens, temperature, stop)
                new = tokens[prompt["input_ids"].shape[1] :]
                said = self.processor.tokenizer.decode(new, skip_special_tokens=True)
                answers.append(Text(said.removeprefix(self._lead)))
                if progress:
                    progress(1)
        finally:
            self.network.train(training)
        return answers

    def _picture_tokens(self, tokens: Tensor, chosen: Callable[[int], Any]) -> Tensor:
        """[L] bool, true for those of a row's tokens of pictures and videos that are chosen."""
        names = ("image_token_id", "video_token_id")
        shown = [getattr(self.unwrapped.config, name) for name in names if hasattr(self.unwrapped.config, name)]
        places = torch.nonzero(torch.isin(tokens, torch.tensor(shown, device=tokens.device))).squeeze(1)
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
