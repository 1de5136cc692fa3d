"""The tab Compare: one prompt, the same seeds, any number of models side by side, and what scorers say."""

import html
import itertools
import json
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from studio import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, MAX_STRENGTH, Stopped, Studio

import mmalign
from mmalign.commands import JUDGED
from mmalign.records import UserError

MAX_SEEDS, MAX_MADE = 4, 24
PLAYERS = {"picture": gr.Image, "video": gr.Video, "sound": gr.Audio}


@dataclass
class Made:
    """One medium of the grid.

    Attributes:
        name: of the model.
        seed: of the noise.
        medium: its kind: picture, video, sound or answer.
        shown: its file, or an answer's text.
        scores: scorer -> score.
    """

    name: str
    seed: int
    medium: str
    shown: str
    scores: dict[str, float] = field(default_factory=dict)


def within(limits: Mapping[str, tuple[Any, float, float]]) -> None:
    """Raises the error to show for the first value that is no number from its low to its high."""
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int | float) or not low <= value <= high:
            raise gr.Error(f"{name} must be a number from {low} to {high}.")


def check(prompt: str, seed: float, steps: float, guidance: float) -> tuple[str, int, int]:
    """The prompt, seed and steps, or the error to show; the page's own limits do not bind a client."""
    prompt = (prompt or "").strip()
    if not 0 < len(prompt) <= MAX_PROMPT:
        raise gr.Error(f"Write a prompt of at most {MAX_PROMPT} characters.")
    within({"Seed": (seed, 0, MAX_SEED), "Steps": (steps, 1, MAX_STEPS), "Guidance": (guidance, 1, MAX_GUIDANCE)})
    return prompt, int(seed), int(steps)


def new_seed() -> int:
    """Any seed."""
    return random.randint(0, MAX_SEED)


def table(scores: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> str:
    """Markdown: one scorer a row; what no other of the same seed reaches is bold."""
    rows = ["| scorer | score |", "|:--|--:|"]
    for name, value in scores.items():
        best = bool(others) and all(value > other[name] for other in others if name in other)
        shown = f"{value:#.5g}"  # enough digits that two do not look alike when one is better
        rows.append(f"| {html.escape(name)} | **{shown}** ▲ |" if best else f"| {html.escape(name)} | {shown} |")
    return "\n".join(rows) if scores else ""


class Compare:
    """The event handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def refuse(
        self,
        prompt: str,
        names: Sequence[str],
        scorers: Sequence[str],
        seed: float,
        count: float,
        steps: float,
        guidance: float,
        strength: float,
        picture: str | None,
    ) -> None:
        """Shows what is wrong, and nothing else: a failed event would cover its outputs with "Error"."""
        check(prompt, seed, steps, guidance)
        within({"Seeds": (count, 1, MAX_SEEDS), "Strength": (strength, 0, MAX_STRENGTH)})
        if not names or len(names) * count > MAX_MADE:
            raise gr.Error(f"Choose at least one model, and at most {MAX_MADE} media in all.")
        try:
            for name in names:
                self.studio.entry(name)
            self.studio.cards(scorers)
            if picture:
                self.studio.open(picture)
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error

    def run(
        self,
        prompt: str,
        names: Sequence[str],
        scorers: Sequence[str],
        seed: float,
        count: float,
        steps: float,
        guidance: float,
        strength: float,
        picture: str | None,
        request: gr.Request,
        show: Any = gr.Progress(),  # noqa: B008 gradio finds it by its default
    ) -> tuple[list[Made], str, str]:
        """The grid, a line about it, and a zip file of everything."""
        self.refuse(prompt, names, scorers, seed, count, steps, guidance, strength, picture)
        settings = {"steps": int(steps), "guidance": guidance, "strength": strength}
        images = [self.studio.open(picture)] if picture else []
        jobs = list(itertools.product(range(int(seed), int(seed) + int(count)), names))
        media, grid = [], []
        try:
            with self.studio.job(request.session_hash, show) as progress:
                for number, (at, name) in enumerate(jobs):
                    medium = self.studio.make(
                        name, prompt.strip(), at, **settings, images=images,
                        progress=lambda share, n=number: progress((n + share) / len(jobs), f"{n + 1} of {len(jobs)}"),
                    )  # fmt: skip
                    kind = self.studio.modality_of(name).medium
                    media.append(medium)
                    grid.append(Made(name, at, kind, self.studio.keep(medium, f"{len(media)}-{name}-seed{at}")))
                progress(1.0, "Scores")
                note = self._score(grid, media, prompt.strip(), images, scorers)
        except Stopped:
            raise gr.Error("Cancelled.") from None
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error
        asked = {"prompt": prompt.strip(), "seed": int(seed), "seeds": int(count), **settings}
        return grid, f"Made {len(grid)}. {note}", self._packed(grid, asked)

    def _score(
        self, grid: Sequence[Made], media: Sequence[Any], prompt: str, images: Sequence[Any], scorers: Sequence[str]
    ) -> str:
        """Fills in the scores; says which scorers were not asked."""
        silent = set(scorers)
        for kind in {made.medium for made in grid}:
            rows = [row for row, made in enumerate(grid) if made.medium == kind]
            judges = [card.name for card in self.studio.cards(scorers) if card.judges == JUDGED.get(kind, kind)]
            silent -= set(judges)
            said = self.studio.score([media[row] for row in rows], prompt, judges, images=images)
            for scorer, values in said.items():
                for row, value in zip(rows, values, strict=True):
                    grid[row].scores[scorer] = value
        return f"{', '.join(sorted(silent))}: for other media, and not asked." if silent else ""

    def _packed(self, grid: Sequence[Made], asked: Mapping[str, Any]) -> str:
        """Path of a zip file: the media, and settings.json."""
        shown = [
            {"model": made.name, "seed": made.seed, "scores": made.scores}
            | ({"answer": made.shown} if made.medium == "answer" else {"file": Path(made.shown).name})
            for made in grid
        ]
        models = {name: self.studio.entry(name).about for name in dict.fromkeys(made.name for made in grid)}
        settings = {**asked, "mmalign": mmalign.__version__, "models": models, "media": shown}
        target = self.studio.fresh("comparison.zip")
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("settings.json", json.dumps(settings, indent=1, ensure_ascii=False))
            for made in grid:
                if made.medium != "answer":
                    archive.write(made.shown, Path(made.shown).name)
        return str(target)

    def stop(self, request: gr.Request) -> str:
        """Ends this visitor's work, and says so."""
        self.studio.stop(request.session_hash)
        return "Cancelled."


def draw(grid: Sequence[Made]) -> None:
    """The media, one row a seed, and below each its scores."""
    for seed, row in itertools.groupby(enumerate(grid), key=lambda numbered: numbered[1].seed):
        row = list(row)
        with gr.Row():
            for number, made in row:
                with gr.Column(min_width=240):
                    about = {"label": f"{made.name} · seed {seed}", "elem_id": f"compare-picture-{number}"}
                    if made.medium == "answer":
                        gr.Textbox(made.shown, **about, lines=4, interactive=False)
                    else:
                        sized = {} if made.medium == "sound" else {"height": 420, "elem_classes": "picture"}
                        PLAYERS[made.medium](made.shown, **about, **sized, buttons=["download"], interactive=False)
                    others = [other.scores for place, other in row if place != number]
                    gr.Markdown(table(made.scores, others), elem_classes="scores", elem_id=f"compare-scores-{number}")


def scorer_choice(studio: Studio, elem_id: str, judges: str | None = None) -> gr.CheckboxGroup:
    """The scorers on this machine, or those of one kind of medium; some that know such pictures are ticked."""
    cards = [card for card in studio.scorer_cards() if judges in (None, card.judges)]
    pictures = [card.name for card in cards if card.judges == "image"]
    ticked = [name for name in pictures if name.startswith("embedded-") == bool(studio.examples)][:4]
    return gr.CheckboxGroup([card.name for card in cards], value=ticked, label="Scorers", elem_id=elem_id)


def tab(studio: Studio) -> None:
    """Fills the tab."""
    page = Compare(studio)
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            (studio.examples or [""])[0],
            label="Prompt",
            max_length=MAX_PROMPT,
            scale=5,
            min_width=240,
            elem_id="compare-prompt",
        )
        with gr.Column(scale=1, min_width=120):
            go = gr.Button("Compare", variant="primary", size="sm", elem_id="compare-go")
            cancel = gr.Button("Cancel", size="sm", elem_id="compare-cancel")
    with gr.Row():
        names = gr.CheckboxGroup(studio.names, value=studio.names[:2], label="Models", elem_id="compare-models")
        scorers = scorer_choice(studio, "compare-scorers")
    with gr.Accordion("Seeds and sampling", open=False):
        with gr.Row():
            with gr.Column(min_width=120):
                seed = gr.Number(
                    0, label="First seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="compare-seed"
                )
                dice = gr.Button("New seed", size="sm", elem_id="compare-new-seed")
            count = gr.Slider(1, MAX_SEEDS, 1, step=1, label="Seeds", elem_id="compare-seeds")
        with gr.Row():
            steps = gr.Slider(
                1, MAX_STEPS, studio.sampling["num_inference_steps"], step=1, label="Steps", elem_id="compare-steps"
            )
            guidance = gr.Slider(1, MAX_GUIDANCE, studio.sampling["guidance_scale"], step=0.5, label="Guidance")
            strength = gr.Slider(
                0, MAX_STRENGTH, 1, step=0.05, label="Strength of LoRAs", info="0 is the base.",
                elem_id="compare-strength",
            )  # fmt: skip
    picture = gr.Image(
        label="Input picture, for models that answer",
        type="filepath",
        image_mode=None,  # as it was uploaded: we open it, within our limits
        sources=["upload", "clipboard"],
        height=240,
        visible=any(entry.may_answer for entry in studio.entries.values()),
        elem_id="compare-input",
    )
    status = gr.Markdown("Press **Compare**.", elem_id="compare-status", min_height=48)
    grid = gr.State([])
    gr.render([grid], [grid.change])(draw)
    files = gr.DownloadButton("Download all and the settings", size="sm", elem_id="compare-download")
    with gr.Accordion("What the scorers judge", open=False):
        lines = [f"- **{html.escape(card.name)}**: {html.escape(card.about)}" for card in studio.scorer_cards()]
        gr.Markdown("\n".join([*lines, "", "▲ marks what a scorer likes best of one seed."]))
    if studio.examples:
        gr.Examples([[text] for text in studio.examples], [prompt], label="Prompts the model was never trained on")

    inputs, outputs = [prompt, names, scorers, seed, count, steps, guidance, strength, picture], [grid, status, files]
    rolled = dice.click(new_seed, None, seed, api_visibility="private")
    work = []
    for number, event in enumerate((go.click, prompt.submit, rolled.then)):
        checked = event(page.refuse, inputs, None, api_visibility="private")
        named = {"api_visibility": "private"} if number else {"api_name": "compare"}
        work.append(
            checked.success(page.run, inputs, outputs, concurrency_id="models", show_progress_on=status, **named)
        )
    cancel.click(page.stop, None, status, queue=False, cancels=work, api_visibility="private")
