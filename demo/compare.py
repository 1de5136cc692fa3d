"""The tab Compare: one prompt, the same seeds, any number of models side by side, and what scorers say."""

import random
from typing import Any

import gradio as gr
from studio import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, Stopped, Studio

from mmalign.records import UserError


def check(prompt: str, seed: float, steps: float, guidance: float) -> tuple[str, int, int]:
    """The prompt, seed and steps, or the error to show; the page's own limits do not bind a client."""
    prompt = (prompt or "").strip()
    if not 0 < len(prompt) <= MAX_PROMPT:
        raise gr.Error(f"Write a prompt of at most {MAX_PROMPT} characters.")
    limits = {
        "Seed": (seed, 0, MAX_SEED),
        "Steps": (steps, 1, MAX_STEPS),
        "Guidance": (guidance, 1, MAX_GUIDANCE),
    }
    for name, (value, low, high) in limits.items():
        if value is None or not low <= value <= high:
            raise gr.Error(f"{name} must be a number from {low} to {high}.")
    return prompt, int(seed), int(steps)


def new_seed() -> int:
    """Any seed."""
    return random.randint(0, MAX_SEED)


def tab(studio: Studio) -> None:
    """Fills the tab."""

    def compare(
        prompt: str, names: list[str], seed: float, steps: float, guidance: float, request: gr.Request,
        show: gr.Progress = gr.Progress(),  # noqa: B008 gradio finds it by its default
    ) -> list[tuple[Any, str]]:  # fmt: skip
        """Pictures with their names."""
        prompt, seed, steps = check(prompt, seed, steps, guidance)
        made: list[tuple[Any, str]] = []
        try:
            with studio.job(request.session_hash, show) as progress:
                for name in names:
                    made.append((studio.make(name, prompt, seed, steps, guidance, progress=progress), name))
        except Stopped:
            gr.Info("Cancelled.")
        except UserError as error:
            raise gr.Error(str(error)) from error
        return made

    def cancelled(request: gr.Request) -> None:
        """Ends this visitor's work."""
        studio.stop(request.session_hash)

    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            label="Prompt", value=(studio.examples or [""])[0], max_length=MAX_PROMPT, scale=5, elem_id="compare-prompt"
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=1, elem_id="compare-seed")
    names = gr.CheckboxGroup(studio.names, value=studio.names[:2], label="Models", elem_id="compare-models")
    with gr.Accordion("Sampling", open=False), gr.Row():
        steps = gr.Slider(1, MAX_STEPS, studio.sampling["num_inference_steps"], step=1, label="Steps")
        guidance = gr.Slider(1, MAX_GUIDANCE, studio.sampling["guidance_scale"], step=0.5, label="Guidance")
    with gr.Row():
        go = gr.Button("Compare", variant="primary", elem_id="compare-go")
        cancel = gr.Button("Cancel", elem_id="compare-cancel")
    gallery = gr.Gallery(label="Pictures", elem_id="compare-pictures", interactive=False)
    go.click(compare, [prompt, names, seed, steps, guidance], gallery, concurrency_id="models", api_name="compare")
    cancel.click(cancelled, queue=False, api_visibility="private")
