"""mmalign: one trainer, any modality, any preference method.

The three entry points are functions that import what they need when they are called, so that
`import mmalign` itself costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmalign.modalities import Modality, Skeleton
    from mmalign.scoring.scorer import Scorer
    from mmalign.training.run import Run

__version__ = "0.1.0"
__all__ = ["bundled", "load", "load_scorer", "skeleton", "train"]


def load(
    source: str | Path,
    lora: str | Path | None = None,
    dtype: Any = None,
    device: Any = None,
    user_layers: str | Path | None = None,
    only: Literal["network", "encoders"] | None = None,
    **options: Any,
) -> Modality:
    """Loads a generative model as a modality: hub id, local folder or single `.safetensors` file.

    Args:
        source: a diffusers pipeline folder, its hub id, or an original-format checkpoint file.
        lora: a LoRA file or folder in diffusers or kohya keys, put on as the policy's adapter.
        dtype: torch dtype of the frozen weights; default bfloat16 on an accelerator, else float32.
        device: default the accelerator when there is one.
        user_layers: file or output folder of a run that had users; `generate` then takes a `user`.
        only: "network" leaves the encoders out until something is generated or saved, for training from a cache;
            "encoders" leaves out the network's weights, for making one.
        options: the family's own, as `vae` (another VAE) for SD1.5 and SDXL.

    Raises:
        mmalign.records.UserError: the source is missing or of a family that is not known.
    """
    from mmalign import modalities

    options |= {"only": only} if only else {}
    return modalities.load(source, lora=lora, dtype=dtype, device=device, user_layers=user_layers, **options)


def skeleton(source: str | Path) -> Skeleton:
    """A model as shapes without memory, for the memory plan; see `mmalign.modalities.Skeleton`."""
    from mmalign import modalities

    return modalities.skeleton(source)


def load_scorer(name_or_folder: str | Path, device: Any = "cpu") -> Scorer:
    """Loads a scorer by its bundled name or from a folder with a `card.yaml`."""
    from mmalign.scoring import scorer

    return scorer.load_scorer(name_or_folder, device=device)


def train(run: Run) -> Path:
    """Runs a recipe and returns its output folder."""
    from mmalign.training.loop import train as run_training

    return run_training(run)


def bundled(kind: str) -> Path:
    """The folder of `recipes`, `scorers` or `demo`, in a checkout as in an installed wheel."""
    package = Path(__file__).parent
    installed = package / "_bundled" / kind
    return installed if installed.is_dir() else package.parent / kind
