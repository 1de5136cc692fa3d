"""Finding a scorer's weights and reading them without running anyone's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.records import UserError
from mmalign.scoring.scorer import Card
from mmalign.storage import load_tensors, sha256

if TYPE_CHECKING:
    import torch


def find(card: Card, source: dict[str, Any]) -> Path:
    """The local path of `{file}` in the card's folder, or of `{hub, file}` in the Hugging Face cache.

    A `missing` beside them says where the file is to be had, if not from a hub.

    Raises:
        UserError: the file is missing, cannot be fetched, or its sha256 is not the card's.
    """
    if "file" not in source:
        raise UserError(f"{card.folder / 'card.yaml'}: the weights need a `file`, and a `hub` if it is to be fetched.")
    path = fetch(card, source) if "hub" in source else card.path(source["file"])
    if not path.is_file():
        raise UserError(
            f"The weights {path} of scorer {card.name!r} are missing: {source.get('missing', 'put the file there')}."
        )
    if source.get("sha256") and sha256(path) != source["sha256"]:
        raise UserError(
            f"{path} is not the file that the card of {card.name!r} names (its sha256 differs): "
            "delete it and fetch it again, or correct the card if you changed the weights on purpose."
        )
    return path


def fetch(card: Card, source: dict[str, Any]) -> Path:
    """Takes a file from the Hugging Face cache, or downloads it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source["hub"], source["file"], revision=source.get("revision")))
    except Exception as error:  # offline, gated, renamed: the hub has a dozen exception types for it
        raise UserError(
            f"Could not fetch {source['file']} of {source['hub']} for scorer {card.name!r} "
            f"({type(error).__name__}): check the connection, or copy {card.folder.name}/ and name a local "
            "`file` in its card's weights instead of `hub`."
        ) from error


def on_disk(card: Card) -> int | None:
    """Bytes of a scorer's weights on this machine; None where some have to be fetched or put there first."""
    from huggingface_hub import try_to_load_from_cache

    total = 0
    for source in (card.weights, card.score.get("head") or {}):
        name = source.get("file", "model.safetensors")
        if "hub" in source:
            cached = try_to_load_from_cache(source["hub"], name, revision=source.get("revision"))
            path = Path(cached) if isinstance(cached, str) else None
        else:
            path = card.path(name) if source else None
        if source and not (path and path.is_file()):
            return None
        total += path.stat().st_size if path else 0
    if "transformers" in card.model and not card.weights:
        folder = card.path(card.model["transformers"])
        config = try_to_load_from_cache(card.model["transformers"], "config.json") if not folder.is_dir() else None
        folder = Path(config).parent if isinstance(config, str) else folder
        if not folder.is_dir():
            return None
        total += sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return total


def state_dict(card: Card, source: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Reads the tensors of a `.safetensors`, or of a checkpoint under `key`, on the CPU.

    Checkpoints are opened with `weights_only=True`: tensors only, no pickled code.

    Raises:
        UserError: as `find`, or the file is no readable checkpoint.
    """
    path = find(card, source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The Hugging Face cache keeps files under their names, so the suffix tells the format.
        content = load_tensors(path, mmap=True)
        for key in filter(None, str(source.get("key", "")).split(".")):
            content = content[key]
        return content
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(
            f"{path} holds no weights that can be read safely ({type(error).__name__}: {error})."
        ) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"{path} is not a readable safetensors file ({error}): fetch it again.") from error
        raise


def renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    """A tensor's name in another layout: each old part gives way to the new one, in order."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def tokenizer(card: Card) -> Callable[[Sequence[str], int], dict[str, torch.Tensor]]:
    """The tokenizer, of transformers, that the card's `model.tokenizer` names: (N prompts, L) -> tensors [N, L].

    It is a hub id, or a folder or a WordPiece vocabulary (.txt) beside the card. Special tokens that are written out in
    a prompt are split into ordinary ones: they would otherwise end it there.

    Raises:
        UserError: it is missing, unreachable or not readable.
    """
    from transformers import AutoTokenizer, BertTokenizer

    name = str(card.model.get("tokenizer"))
    path = card.path(name)
    try:
        if path.suffix == ".txt":
            words = path.read_text(encoding="utf-8").splitlines()
            found = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
        else:
            found = AutoTokenizer.from_pretrained(path if path.exists() else name, trust_remote_code=False)
    except Exception as error:  # the hub's, the file system's and the parser's
        raise UserError(
            f"{card.folder / 'card.yaml'}: cannot load the tokenizer {name!r} ({type(error).__name__}): check the "
            "connection, or name a folder of tokenizer files, or a vocabulary (.txt), that lies beside the card."
        ) from error
    return lambda prompts, length: found(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length,
        split_special_tokens=True,
        return_tensors="pt",
    )


def fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], card: Card) -> None:
    """Copies tensors into a module, all of them and nothing else, cast to the module's dtype.

    Raises:
        UserError: names or shapes differ; it names the first ones.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"The weights of {card.name!r} do not fit its model: {str(error).splitlines()[-1].strip()}"
        ) from None
    if missing or unexpected:
        raise UserError(
            f"The weights of {card.name!r} do not fit its model: "
            f"missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} ({len(unexpected)})."
        )
