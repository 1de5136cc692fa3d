"""The demo: a model beside its aligned self, on one page.

    python demo/app.py                             the embedded model
    python demo/app.py --lora DIR                  with a LoRA, such as the one that `mmalign quickstart` made
    python demo/app.py --base MODEL --lora DIR     a pipeline folder, a single file or a hub id

It listens on 127.0.0.1 alone, shares nothing and takes no files or URLs; one picture is made at a time.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import gradio as gr

import mmalign
from mmalign import embedded
from mmalign.records import UserError
from mmalign.scoring.scorer import list_scorers
from mmalign.training.views import WeightViews

MAX_PROMPT, MAX_SEED, MAX_STEPS, MAX_GUIDANCE = 300, 2**31 - 1, 50, 20.0
USUAL_SAMPLING = {"num_inference_steps": 30, "guidance_scale": 5.0}  # for models other than the embedded one
NO_LORA = "**No LoRA is loaded.** Run `mmalign quickstart`, then start the demo with `--lora` and its output."
STYLE = """
.picture img { width: 100% !important; height: 100% !important; object-fit: contain }
.scores table { width: 100% }
.scores :is(table, thead, tbody, tr, th, td) { border: 0 !important }
.scores td { font-variant-numeric: tabular-nums }
.scores :is(th, td) { border-bottom: 1px solid var(--border-color-primary) !important }
"""
LOOK = {
    "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": STYLE,
}


class Compare:
    """The model with its adapter on and off, and the bundled scorers; loaded once.

    Args:
        base: Pipeline folder, single file or hub id; None for the embedded model.
        lora: LoRA file or folder; None shows the base alone.

    Raises:
        mmalign.records.UserError: The model or the LoRA cannot be loaded.
    """

    def __init__(self, base: str | Path | None = None, lora: str | Path | None = None):
        self.modality = mmalign.load(base or embedded.path(), lora=lora)
        self.views = WeightViews(self.modality)
        self.aligned = lora is not None
        bundled = [c for c in list_scorers() if "hub" not in c.weights and "transformers" not in c.model]
        cards = [card for card in bundled if card.judges == "image"]
        self.about = {card.name: card.about for card in cards}
        self.scorers = {card.name: mmalign.load_scorer(card.folder) for card in cards}

    def __call__(self, prompt: str, seed: float, steps: float, guidance: float) -> tuple[Any, Any, str, str]:
        """Base picture, aligned picture, and under each its scores as a Markdown table."""
        prompt, seed, steps = check(prompt, seed, steps, guidance)
        settings = {"seeds": [seed], "num_inference_steps": steps, "guidance_scale": guidance}
        try:
            pictures = self.modality.generate([prompt], **settings)  # the policy: aligned, if there is a LoRA
            if self.aligned:
                with self.views("reference"):
                    pictures = self.modality.generate([prompt], **settings) + pictures
            scores = {
                name: scorer.score(pictures, [prompt] * len(pictures)).tolist() for name, scorer in self.scorers.items()
            }
        except UserError as error:
            raise gr.Error(str(error)) from error
        if not self.aligned:
            return pictures[0], None, table(scores, 0), NO_LORA
        return pictures[0], pictures[1], table(scores, 0), table(scores, 1)


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


def refuse(prompt: str, seed: float, steps: float, guidance: float) -> None:
    """Shows what `check` finds wrong, and nothing else."""
    check(prompt, seed, steps, guidance)


def new_seed() -> int:
    """Any seed."""
    return random.randint(0, MAX_SEED)


def table(scores: dict[str, list[float]], side: int) -> str:
    """Markdown: one scorer a row; the side that it prefers is bold."""
    rows = ["| scorer | score |", "|:--|--:|"]
    for name, values in scores.items():
        best = len(values) > 1 and values[side] > values[1 - side]
        shown = f"{values[side]:#.5g}"  # enough digits that two sides do not look alike when one is better
        rows.append(f"| {name} | **{shown}** ▲ |" if best else f"| {name} | {shown} |")
    return "\n".join(rows)


def build(base: str | Path | None = None, lora: str | Path | None = None) -> gr.Blocks:
    """The page, with its models loaded; arguments and errors as for `Compare`."""
    compare = Compare(base, lora)
    examples = [] if base else embedded.prompts("test")[::97][:4]
    sampling = USUAL_SAMPLING if base else embedded.SAMPLING
    with (
        gr.Blocks(title="mmalign", analytics_enabled=False, delete_cache=(3600, 3600)) as page,
        gr.Tab("Compare"),
    ):
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Prompt", value=(examples or [""])[0], max_length=MAX_PROMPT, scale=5, autofocus=True
            )
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED, scale=1, min_width=90)
            with gr.Column(scale=1, min_width=120):
                go = gr.Button("Compare", variant="primary", size="sm")
                dice = gr.Button("New seed", size="sm")
        with gr.Accordion("Sampling", open=False), gr.Row():
            steps = gr.Slider(1, MAX_STEPS, sampling["num_inference_steps"], step=1, label="Steps")
            guidance = gr.Slider(1, MAX_GUIDANCE, sampling["guidance_scale"], step=0.5, label="Guidance")
        with gr.Row():
            pictures, scores = [], []
            for label in ("Base", "Aligned"):
                with gr.Column(min_width=240):
                    pictures.append(
                        gr.Image(
                            label=label,
                            format="png",
                            interactive=False,
                            buttons=["download"],
                            height=420,
                            elem_classes="picture",
                        )
                    )
                    scores.append(gr.Markdown(elem_classes="scores"))
        with gr.Accordion("What the scorers judge", open=False):
            lines = [f"- **{name}**: {about}" for name, about in compare.about.items()]
            gr.Markdown("\n".join([*lines, "", "▲ marks the side that a scorer likes better."]))
        if examples:
            gr.Examples([[example] for example in examples], [prompt], label="Prompts the model was never trained on")
        inputs, outputs = [prompt, seed, steps, guidance], [*pictures, *scores]
        rolled = dice.click(new_seed, None, seed, api_visibility="private")
        # What is wrong is said first, by an event without outputs: a failed one would cover its pictures with "Error"
        checks = [event(refuse, inputs, None, api_visibility="private") for event in (go.click, prompt.submit)]
        checks += [event(refuse, inputs, None, api_visibility="private") for event in (seed.submit, rolled.then)]
        for number, checked in enumerate(checks):
            named = {"api_visibility": "private"} if number else {"api_name": "compare"}
            checked.success(compare, inputs, outputs, **named)
    return page.queue(max_size=16, default_concurrency_limit=1)


def launch(base: str | Path | None = None, lora: str | Path | None = None, port: int | None = None, **options: Any):
    """Serve the page on this machine until it is interrupted."""
    local = {"server_name": "127.0.0.1", "share": False, "ssr_mode": False, "max_file_size": "1kb"}
    return build(base, lora).launch(**options, **local, **LOOK, server_port=port, footer_links=[])


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="pipeline folder, single file or hub id; default: the embedded model")
    parser.add_argument("--lora", help="LoRA file or folder to compare with the base")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args()
    try:
        launch(arguments.base, arguments.lora, arguments.port)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
