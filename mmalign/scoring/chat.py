"""A vision-language model that is asked about pictures and videos.

Shapes: N contents, V vocabulary, L tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmalign.records import UserError


class Chat:
    """A transformers vision-language model and its processor.

    A content is one user's turn, in order: text (str), pictures, and videos (each a list of pictures, its frames). Rows
    are padded on the left, so that every answer begins in the last column; a row's answer does not depend on the
    others beyond rounding.

    Args:
        model: with a language-model head, or whatever else is called with the processor's output.
        processor: with a chat template.
        source: what to call it in errors.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{source}: has no chat template, which says where a question ends; take a chat model.")
        self.model = model.eval().requires_grad_(False)
        self.processor, self.source = processor, source
        self.control = tuple(processor.tokenizer.all_special_tokens)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Chat:
        """Loads a model from a folder or a hub id.

        Args:
            source: folder or id with weights, processor, tokenizer and chat template.
            device: where it computes.
            dtype: of the weights; default bfloat16 on an accelerator, else float32.

        Raises:
            UserError: it cannot be had, or there is no chat template.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        try:
            processor = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(str(source), dtype=dtype, trust_remote_code=False)
        except Exception as error:  # a hub has a dozen exception types for absent, gated and offline
            raise UserError(
                f"{source}: the vision-language model cannot be loaded ({str(error).strip().splitlines()[0]}); "
                "check the name and the connection, or give a local folder."
            ) from error
        return cls(model.to(device), processor, str(source))

    def check(self, text: str) -> None:
        """Text with control tokens in it would end turns or ask for pictures that are not there.

        Raises:
            UserError: it has one.
        """
        for token in self.control:
            if token in text:
                raise UserError(f"{text[:60]!r}: the text holds the special token {token}; remove it.")

    def inputs(self, contents: Sequence[Sequence[Any]], **settings: Any) -> Any:
        """What the model is called with, up to where the answers begin; on its device, nothing truncated.

        Args:
            contents: N of them; of frames the attribute `fps`, where they have it, says how far apart they are.
            settings: more of the processor's arguments.

        Raises:
            UserError: a text holds a special token.
        """
        turns, images, videos = [], [], []
        for content in contents:
            parts, pictures = [], []
            for part in content:
                if isinstance(part, str):
                    self.check(part)
                    parts.append({"type": "text", "text": part})
                elif isinstance(part, Image.Image):
                    parts.append({"type": "image"})
                    pictures.append(part)
                else:
                    parts.append({"type": "video"})
                    videos.append(part)
            turns.append([{"role": "user", "content": parts}])
            images.append(pictures)
        texts = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        if bos and texts[0].startswith(bos):  # Gemma's template has it already
            settings = settings | {"add_special_tokens": False}
        shown = settings | ({"images": images} if any(images) else {})
        if videos:
            told = [{"total_num_frames": len(v), "fps": getattr(v, "fps", None)} for v in videos]
            told = [one | {"frames_indices": list(range(one["total_num_frames"]))} for one in told]
            shown |= {"videos": videos, "video_metadata": told, "do_sample_frames": False}
        batch = self.processor(
            text=texts, **shown, padding=True, padding_side="left", truncation=False, return_tensors="pt"
        )
        return batch.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def answer(self, contents: Sequence[Sequence[Any]], max_new_tokens: int = 256) -> list[str]:
        """The likeliest token each time; the model's own sampling settings do not count."""
        from transformers import GenerationConfig

        end = self.model.generation_config.eos_token_id
        ends = {*(end if isinstance(end, list) else [end]), self.processor.tokenizer.eos_token_id} - {None}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            **{"temperature": 1.0, "top_p": 1.0, "top_k": 50},  # of no effect; transformers warns of the folder's
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )
        batch = self.inputs(contents)
        tokens = self.model.generate(**batch, generation_config=config)
        return self.processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def logits(self, contents: Sequence[Sequence[Any]]) -> Tensor:
        """Of the first answer token: [N, V] float32."""
        return self.model(**self.inputs(contents), use_cache=False, logits_to_keep=1).logits[:, -1].float()

    @torch.no_grad()
    def logp(self, contents: Sequence[Sequence[Any]], answers: Sequence[str]) -> list[Tensor]:
        """Log-probabilities of each answer's tokens, N of [L] float32; the token that ends the turn is not asked for.

        Raises:
            UserError: a text holds a special token, or an answer is empty.
        """
        for answer in answers:
            self.check(answer)
            if not answer:
                raise UserError("An answer is empty, so it has no likelihood; leave it out.")
        batch = self.inputs(contents)
        tokenizer, asked = self.processor.tokenizer, batch["input_ids"]
        added = tokenizer(
            list(answers), add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        ).to(asked.device)
        for name, value in batch.items():  # along the tokens an answer is text: no picture
            if value.shape == asked.shape:
                batch[name] = torch.cat([value, added.get(name, torch.zeros_like(added["input_ids"])).to(value)], 1)
        length = added["input_ids"].shape[1]
        logits = self.model(**batch, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(-1, added["input_ids"][..., None])[..., 0]  # [N, L]
        return [row[mask.bool()] for row, mask in zip(chosen, added["attention_mask"], strict=True)]
