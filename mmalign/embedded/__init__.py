"""The small models that ship with mmalign, and the prompts they were and were not trained on."""

from pathlib import Path

SAMPLING = {"num_inference_steps": 12, "guidance_scale": 4.0}  # chosen on development prompts
AUDIO_SAMPLING = {"num_inference_steps": 12, "guidance_scale": 1.0}  # none: the distribution that was trained
VLM_SAMPLING = {"max_new_tokens": 24, "temperature": 1.0}  # the distribution that was trained, and is aligned


def path(model: str = "t2i") -> Path:
    """The folder of a model: "t2i" (StableDiffusionXLPipeline), "t2a" (StableAudioPipeline), "vlm" (Qwen2-VL)."""
    return Path(__file__).parent / model


def prompts(split: str) -> list[str]:
    """The captions of a split: "train", "pairs", "scorer_fit", "development" or "test"; see `scenes`."""
    from mmalign.embedded import scenes

    return scenes.prompts(split)
