"""The small text-to-image model that ships with mmalign, and the prompts it was and was not trained on."""

from pathlib import Path

SAMPLING = {"num_inference_steps": 12, "guidance_scale": 4.0}  # chosen on development prompts


def path() -> Path:
    """The folder of the embedded StableDiffusionXLPipeline."""
    return Path(__file__).parent / "t2i"


def prompts(split: str) -> list[str]:
    """The captions of a split: "train", "pairs", "scorer_fit", "development" or "test"; see `scenes`."""
    from mmalign.embedded import scenes

    return scenes.prompts(split)
