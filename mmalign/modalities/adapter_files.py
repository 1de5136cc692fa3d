"""LoRA files in PEFT's own format, which plain PEFT and others' tools read.

For the networks of transformers, and for those of diffusers whose pipelines read no LoRA (PixArt).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmalign.records import UserError
from mmalign.surrogate.probes import at_least_float32

ADAPTER_FILE = "adapter_model.safetensors"  # beside adapter_config.json
PREFIX = "base_model.model."


def load_adapter(model: Any, path: str | Path, name: str, source: str) -> None:
    """Puts a LoRA on a network; its weights are float32 or finer.

    Args:
        model: a network without wrappers.
        path: folder or hub id.
        name: of the adapter on the network.
        source: where the network came from, for errors.

    Raises:
        UserError: the files are missing, hold no LoRA, or were made for another architecture.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    path, source = Path(path), source or "the model"
    local = path.exists() or path.is_absolute() or str(path).count("/") != 1
    if local and not (path / ADAPTER_FILE).is_file():
        raise UserError(f"{path}: has no {ADAPTER_FILE}; give the folder of a PEFT adapter.")
    try:
        config = LoraConfig.from_pretrained(str(path))
        if not isinstance(config, LoraConfig):
            raise ValueError("it is no LoRA")
        state = {key.removeprefix(PREFIX): value for key, value in load_peft_weights(str(path), device="cpu").items()}
        if hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name=name)
        else:
            inject_adapter_in_model(config, model, name)
        result = set_peft_model_state_dict(model, state, adapter_name=name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: this LoRA does not fit {source} ({reason}).") from error
    wrong = [*(key for key in result.missing_keys if f".{name}." in key), *result.unexpected_keys]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} of its layers do not fit {source} (as {wrong[0]});"
            " it was made for another architecture."
        )
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data = at_least_float32(parameter.data)


def save_adapter(model: Any, folder: str | Path, source: str) -> None:
    """Writes the adapter "policy" of a network that was loaded from `source`."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, adapter_name="policy")
    save_file({PREFIX + key: value.contiguous() for key, value in state.items()}, Path(folder) / ADAPTER_FILE)
    replace(model.peft_config["policy"], base_model_name_or_path=source, inference_mode=True).save_pretrained(folder)
