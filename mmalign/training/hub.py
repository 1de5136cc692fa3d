"""Uploading the result. The repository is made before training, so that a missing token costs nothing."""

from __future__ import annotations

from pathlib import Path

from mmalign.records import UserError
from mmalign.training.checkpoint import PREFIX
from mmalign.training.run import Run

LEFT_OUT = (f"{PREFIX}*", ".*")  # checkpoints, and what is half-written


def repository(run: Run) -> str:
    """Makes the repository if it is not there; returns its id.

    Raises:
        UserError: the hub cannot be reached, or does not let this user write there.
    """
    from huggingface_hub import HfApi

    name = run.hub_model_id or Path(run.output_dir).name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the network, of the hub, of the name: one sentence for each
        raise UserError(
            f"push_to_hub: {name} cannot be made or written to ({_line(error)}); log in with `hf auth login`, or train"
            " without push_to_hub."
        ) from error


def upload(name: str, output_dir: Path) -> None:
    """Uploads the output folder without its checkpoints.

    Raises:
        RuntimeError: it failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=name, folder_path=output_dir, ignore_patterns=list(LEFT_OUT))
    except Exception as error:  # hours of training stand behind it: whatever happened is said in one sentence
        raise RuntimeError(
            f"the upload to {name} did not go through ({_line(error)}); training is done and {output_dir} is whole: try"
            f" again with hf upload {name} {output_dir} --exclude '{PREFIX}*'."
        ) from error


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
