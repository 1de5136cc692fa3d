"""The tab Score: what every scorer on this machine says of dropped pictures."""

import csv
import html
import itertools
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr
from compare import scorer_choice
from gate import MAX_UPLOAD
from studio import MAX_PROMPT, Stopped, Studio

from mmalign.records import UserError

MAX_FILES = 200
MAX_NAMED = 30  # pictures whose names stand beside the plot
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"]


def pictures_of(paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and encoded pictures of files and of what is in zip files, which are never unpacked onto the disk.

    Raises:
        UserError: too many, too large, or a zip file that is damaged, encrypted or not what it seems.
    """
    count = 0
    for path in paths:
        if Path(path).suffix.lower() != ".zip":
            found: Iterator[tuple[str, Any]] = iter([(Path(path).name, path)])
        else:
            found = _zipped(path)
        for one in found:
            count += 1
            if count > MAX_FILES:
                raise UserError(f"More than {MAX_FILES} pictures; score them in parts, or with mmalign score.")
            yield one


def _zipped(path: str) -> Iterator[tuple[str, bytes]]:
    name = Path(path).name
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_UPLOAD:
                raise UserError(f"{name}: more than {MAX_FILES} files, or {MAX_UPLOAD // 2**20} MB unpacked; split it.")
            for member in members:
                place = PurePosixPath(member.filename.replace("\\", "/"))
                if place.is_absolute() or ".." in place.parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{name}: {member.filename!r} points out of the zip file; pack it anew.")
                with archive.open(member) as file:  # reads no more than the header of the file promises
                    yield member.filename, file.read(member.file_size)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, OSError, EOFError) as error:
        raise UserError(f"{name}: cannot be unpacked ({error}); pack it anew, without a password.") from error


class Score:
    """The event handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def refuse(self, files: Sequence[str] | None, prompt: str, scorers: Sequence[str]) -> None:
        """Shows what is wrong, and nothing else: a failed event would cover its outputs with "Error"."""
        if not files or not scorers:
            raise gr.Error("Drop pictures or a zip file, and choose a scorer.")
        if not 0 < len((prompt or "").strip()) <= MAX_PROMPT:
            raise gr.Error(f"Write the prompt of the pictures, at most {MAX_PROMPT} characters.")
        try:
            self.studio.cards(scorers)
            for _ in pictures_of(files):
                pass
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error

    def run(
        self,
        files: Sequence[str],
        prompt: str,
        scorers: Sequence[str],
        request: gr.Request,
        show: Any = gr.Progress(),  # noqa: B008 gradio finds it by its default
    ) -> tuple[Any, str, Any, str]:
        """Table, a line about it, plot, and a CSV file."""
        self.refuse(files, prompt, scorers)
        names, pictures, left_out = [], [], []
        try:
            with self.studio.job(request.session_hash, show) as progress:
                for name, picture in pictures_of(files):
                    progress(0.0, "Reading")
                    try:
                        pictures.append(self.studio.open(picture, name))
                        names.append(name)
                    except UserError as error:
                        left_out.append(str(error))
                if not pictures:
                    raise UserError(f"Nothing was scored: {left_out[0]}")
                scores = self.studio.score(pictures, prompt.strip(), scorers, progress=progress)
        except Stopped:
            raise gr.Error("Cancelled.") from None
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error
        rows = [[name, *values] for name, *values in zip(names, *scores.values(), strict=True)]
        target = self.studio.fresh("scores.csv")
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "prompt", *scores])
            writer.writerows([_plain(name), _plain(prompt.strip()), *values] for name, *values in rows)
        rounded = [[name, *(float(f"{value:.5g}") for value in values)] for name, *values in rows]
        kinds = ["str"] + ["number"] * len(scores)
        shown = gr.Dataframe({"headers": ["picture", *scores], "data": rounded}, datatype=kinds)
        note = f"{len(rows)} scored, {len(left_out)} left out." + "".join(f"\n- {html.escape(x)}" for x in left_out)
        return shown, note, chart(names, scores), str(target)

    def stop(self, request: gr.Request) -> str:
        """Ends this visitor's work, and says so."""
        self.studio.stop(request.session_hash)
        return "Cancelled."


def _plain(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def chart(names: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Any:
    """A panel a scorer: its pictures from the best down, as scorers have different scales."""
    from matplotlib.figure import Figure

    from mmalign.evaluation.report import COLOURS

    figure = Figure(figsize=(6, (1 + 0.2 * min(len(names), MAX_NAMED)) * len(scores)), layout="constrained")
    panels = figure.subplots(len(scores), squeeze=False)[:, 0]
    for axes, (scorer, values), colour in zip(panels, scores.items(), itertools.cycle(COLOURS)):
        order = sorted(range(len(names)), key=lambda row: values[row])
        axes.plot([values[row] for row in order], range(len(order)), "o", color=colour)
        labels = [names[row][-24:].replace("$", r"\$") for row in order]  # $ begins a formula
        shown = len(names) <= MAX_NAMED
        axes.set_yticks(range(len(order)) if shown else (), labels if shown else (), fontsize=8)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(scorer, fontsize=9, loc="left")
        axes.grid(alpha=0.3, linewidth=0.5)
    return figure


def tab(studio: Studio) -> None:
    """Fills the tab."""
    page = Score(studio)
    files = gr.File(
        label="Pictures or a zip file",
        file_count="multiple",
        file_types=[*SUFFIXES, ".zip"],
        height=160,
        elem_id="score-files",
    )
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(label="Prompt", max_length=MAX_PROMPT, scale=5, min_width=240, elem_id="score-prompt")
        with gr.Column(scale=1, min_width=120):
            go = gr.Button("Score", variant="primary", size="sm", elem_id="score-go")
            cancel = gr.Button("Cancel", size="sm", elem_id="score-cancel")
    scorers = scorer_choice(studio, "score-scorers", "image")
    limits = f"at most {MAX_FILES} of them, {MAX_UPLOAD // 2**20} MB in all"
    said = f"Drop pictures, {limits}, write what was asked for, and press **Score**."
    status = gr.Markdown(said, elem_id="score-status", min_height=48)
    with gr.Row():
        rows = gr.Dataframe(headers=["picture"], datatype="str", interactive=False, elem_id="score-table", scale=3)
        plot = gr.Plot(show_label=False, elem_id="score-plot", scale=2)
    sheet = gr.DownloadButton("Download CSV", size="sm", elem_id="score-download")

    inputs = [files, prompt, scorers]
    work = []
    for number, event in enumerate((go.click, prompt.submit)):
        checked = event(page.refuse, inputs, None, api_visibility="private")
        named = {"api_visibility": "private"} if number else {"api_name": "score"}
        work.append(
            checked.success(
                page.run,
                inputs,
                [rows, status, plot, sheet],
                concurrency_id="models",
                show_progress_on=status,
                **named,
            )
        )
    cancel.click(page.stop, None, status, queue=False, cancels=work, api_visibility="private")
