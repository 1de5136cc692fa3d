"""The tab Arena: what two or four models made, shown without their names; a vote; who is ahead; votes to train on."""

import html
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from studio import MAX_PROMPT, MAX_SEED, Stopped, Studio

from mmalign.evaluation.votes import BAD, TIE, Ballot, Votes, matchups, standings, voters
from mmalign.records import Text, UserError
from mmalign.voting import export

AHEAD = 2  # ballots that wait for a voter, made while they look at another
LETTERS = "ABCD"
BUTTONS = ("arena-left", "arena-right", "arena-third", "arena-fourth")
KEYS = dict(zip("1234", BUTTONS, strict=True)) | {
    "ArrowLeft": "arena-left", "ArrowRight": "arena-right", "0": "arena-tie", "x": "arena-bad", "n": "arena-next"
}  # fmt: skip
LISTEN = f"""
if (!window.mmalignKeys) {{
  window.mmalignKeys = {KEYS!r};
  document.addEventListener('keydown', (event) => {{
    const typing = event.target.closest('textarea, select, input:not([type=radio]), [contenteditable=true]');
    const button = document.getElementById(window.mmalignKeys[event.key]);
    if (typing || !button?.offsetParent || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    button.click();
  }});
}}
"""
# A browser keeps the number that its votes are counted under; where it may keep nothing, it is a new one every time.
WHO = """(voter, ...rest) => {
  const fresh = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join('');
  try { voter = localStorage.mmalignVoter ||= fresh() } catch { voter ||= fresh() }
  return [voter, ...rest];
}"""
SIZE = 'style="width: 100%; max-height: 60vh; object-fit: contain"'
PLAYERS = {
    ".png": f'<img src="{{}}" alt="{{}}" {SIZE}>',
    ".mp4": f'<video src="{{}}" title="{{}}" {SIZE} controls loop autoplay muted playsinline></video>',
    ".flac": '<audio src="{}" title="{}" style="width: 100%" controls></audio>',
}


class Arena:
    """The event handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.votes = Votes(studio.data_dir)
        # Without a user, what user layers are on is its base
        self.names = [name for name in studio.names if not studio.entry(name).user_layers]
        self.prompts = studio.prompts
        self.rounds = count(1)

    def check(self, voter: str, ways: int, own: str, request: gr.Request) -> tuple[str, int, str | None]:
        """The voter's hash, how many media and their own prompt; or the error to show."""
        own = (own or "").strip()
        if ways not in (2, 4) or ways > len(self.names):
            raise gr.Error("Choose two or four media, and not more than there are models.")
        if len(own) > MAX_PROMPT or not (own or self.prompts):
            raise gr.Error(f"Write a prompt of at most {MAX_PROMPT} characters.")
        who = f"user {request.username}" if request.username else f"browser {voter or request.session_hash}"
        return self.votes.voter(who[:100]), ways, own or None

    def deal(self, voter: str, ways: int, own: str, request: gr.Request) -> list[Any]:
        """The next ballot; where nothing is in stock, it is asked for."""
        hashed, ways, prompt = self.check(voter, ways, own, request)
        ballot = self.votes.issue(hashed, self.names, ways, prompt=prompt)
        return [voter, gr.skip() if ballot else next(self.rounds), *self.shown(ballot, ways)]

    def make(self, voter: str, ways: int, own: str, request: gr.Request, show: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        """Makes what the next ballot shows, and shows it."""
        hashed, ways, prompt = self.check(voter, ways, own, request)
        with self.working(request, show) as progress:
            self.stock(hashed, ways, prompt, progress)
        ballot = self.votes.issue(hashed, self.names, ways, prompt=prompt)
        if not ballot:
            raise gr.Error("The models made the very same, so there is nothing to choose; press Next for another.")
        return self.shown(ballot, ways)

    def ahead(self, voter: str, ways: int, own: str, request: gr.Request) -> None:
        """Makes a ballot of the common prompts, if too few wait for this voter."""
        hashed, ways, prompt = self.check(voter, ways, own, request)
        if not prompt and self.votes.waiting(hashed, self.names, ways) < AHEAD:
            with self.working(request, lambda *_: None) as progress:
                self.stock(hashed, ways, None, progress)

    @contextmanager
    def working(self, request: gr.Request, show: Any) -> Iterator[Any]:
        """Long work that Cancel ends; what goes wrong is said."""
        try:
            with self.studio.job(request.session_hash, show) as progress:
                yield progress
        except Stopped:
            raise gr.Error("Cancelled.") from None
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error

    def stock(self, voter: str, ways: int, prompt: str | None, progress: Any) -> None:
        """Has media made of those models of which a vote tells most, of one prompt and seed."""
        from mmalign.data.candidates import KINDS, PICTURE, encoded

        chosen = matchups(self.votes.ratings(), self.names, ways, random.Random())[0]
        settings = {"seed": random.randint(0, MAX_SEED), **self.studio.sampling}
        text = prompt or random.choice(self.prompts)
        files = {}
        for number, name in enumerate(chosen):
            medium = self.studio.make(
                name, text, settings["seed"], settings["num_inference_steps"], settings["guidance_scale"],
                progress=lambda share, n=number: progress((n + share) / ways, f"{n + 1} of {ways}"),
            )  # fmt: skip
            content = medium.encode() if isinstance(medium, Text) else encoded(medium)
            files[name] = self.votes.keep(content, KINDS.get(type(medium), PICTURE)[1].strip(".") or "txt")
        self.votes.add(text, settings, files, owner=voter if prompt else "")

    def shown(self, ballot: Ballot | None, ways: int) -> list[Any]:
        """What a ballot fills: its token, the order of choice, prompt, status, media, their makers, two columns."""
        if not ballot:
            return ["", "", "", "Making them …", *[""] * 8, *[gr.skip()] * 2]
        media = [medium(self.votes.media / file, letter) for file, letter in zip(ballot.files, LETTERS, strict=False)]
        empty = [""] * (4 - ways)
        columns = [gr.Column(visible=ways == 4)] * 2
        asked = "Which is better?" if ways == 2 else "Press them in the order of your liking, the best first."
        return [ballot.token, "", ballot.prompt, asked, *media, *empty, *["?"] * ways, *empty, *columns]

    def vote(self, token: str, choice: str) -> list[Any]:
        """Casts a vote as soon as the choice is whole, and then tells who made what."""
        ballot = self.votes.ballot(token)
        if ballot and choice not in (TIE, BAD) and len(choice) < len(ballot.models) - 1:
            order = ", ".join(LETTERS[int(digit) - 1] for digit in choice if digit in "1234")
            return [f"The best first: {order} …", *[gr.skip()] * 4]
        try:
            cast = self.votes.vote(token, choice)
        except UserError as error:
            raise gr.Error(html.escape(str(error))) from error
        ranked = " > ".join(letter for _, letter in sorted(zip(cast.places, LETTERS, strict=False)))
        said = "both bad" if cast.bad else "a tie" if len(set(cast.places)) == 1 else ranked
        names = [*cast.models, *[""] * (4 - len(cast.models))]
        return [f"Your vote counts: {said}. Press Next, or n.", *names]

    def board(self) -> tuple[str, list[list[Any]], list[list[Any]]]:
        """A line, the models' standings, and the voters."""
        cast = self.votes.all()
        models = [
            [row.model, f"{row.rating:.2f} ({row.low:.2f} to {row.high:.2f})",
             f"{row.strength:.2f} ({row.strength_low:.2f} to {row.strength_high:.2f})", f"{row.won:.0%}", row.votes]
            for row in standings(cast, self.votes.ratings())
        ]  # fmt: skip
        people = [
            [row.voter, row.votes, f"{row.agreed} of {row.compared}", f"{row.by_chance:.2g}",
             "outlier" if row.outlier else ""]
            for row in voters(cast)
        ]  # fmt: skip
        return f"{len(cast)} votes of {len(people)} people.", models, people

    def save(self) -> tuple[str, str]:
        """What was exported, and a zip file of it."""
        folder = self.studio.fresh("votes")
        try:
            said = export(str(self.studio.data_dir), str(folder), layout="jsonl")
        except UserError as error:
            raise gr.Error(html.escape(str(error).replace(str(self.studio.data_dir), "The Arena"))) from error
        shutil.make_archive(str(folder), "zip", folder)
        return said.replace(str(folder), "the file").replace(str(self.votes.media), "media"), f"{folder}.zip"

    def stop(self, request: gr.Request) -> None:
        """Ends this visitor's work."""
        self.studio.stop(request.session_hash)


def medium(path: Path, letter: str) -> str:
    """HTML that shows a file of the media folder."""
    if path.suffix == ".txt":
        return f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>"
    return PLAYERS[path.suffix].format(f"gradio_api/file={quote(str(path))}", letter)


def tab(studio: Studio) -> None:
    """Fills the tab."""
    page = Arena(studio)
    if len(page.names) < 2:
        gr.Markdown("The Arena needs two models: start the demo with `--lora` or `--model` as well.")
        return
    choices = [("Two: choose the better", 2), ("Four: put them in order", 4)]
    hidden = {"visible": "hidden", "container": False}
    with gr.Row(equal_height=True):
        own = gr.Textbox(
            label="Your own prompt",
            placeholder="Empty: one of ours" if page.prompts else "",
            max_length=MAX_PROMPT,
            scale=5,
            min_width=240,
            elem_id="arena-own",
        )
        ways = gr.Radio(choices[: len(page.names) // 2], value=2, label="Show", scale=3, elem_id="arena-ways")
        with gr.Column(scale=1, min_width=120):
            following = gr.Button("Next", variant="primary", size="sm", elem_id="arena-next")
            cancel = gr.Button("Cancel", size="sm", elem_id="arena-cancel")
    prompt = gr.Textbox(label="Prompt", interactive=False, lines=2, elem_id="arena-prompt")
    status = gr.Textbox("Press Next.", show_label=False, interactive=False, lines=2, elem_id="arena-status")
    token, order, voter = (gr.Textbox("", elem_id=f"arena-{name}", **hidden) for name in ("token", "order", "voter"))
    wanted = gr.Number(0, elem_id="arena-wanted", **hidden)  # a State that changes outside the queue tells no browser
    columns, media, names, buttons = [], [], [], []
    with gr.Row():
        for letter, elem_id in zip(LETTERS, BUTTONS, strict=True):
            number = len(columns)
            with gr.Column(min_width=150, visible=number < 2) as column:
                media.append(gr.HTML("", elem_id=f"arena-picture-{number}", min_height=160))
                buttons.append(gr.Button(letter, elem_id=elem_id))
                names.append(
                    gr.Textbox("", show_label=False, container=False, interactive=False, elem_id=f"arena-name-{number}")
                )
            columns.append(column)
    with gr.Row():
        buttons.append(gr.Button("Tie", size="sm", min_width=120, elem_id="arena-tie"))
        buttons.append(gr.Button("All bad", size="sm", min_width=120, elem_id="arena-bad"))
    gr.Markdown("Keys: `1` to `4`, or `←` and `→`, choose; `0` is a tie, `x` all bad, `n` the next.")
    gr.HTML("", js_on_load=LISTEN)

    asked, ballot = [voter, ways, own], [token, order, prompt, status, *media, *names, *columns[2:]]
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}  # never behind what is being made
    slow: dict[str, Any] = {"concurrency_id": "models", "api_visibility": "private"}
    private = {"api_visibility": "private"}
    work = [wanted.change(page.make, asked, ballot, show_progress_on=status, **slow)]
    for number, event in enumerate((following.click, own.submit, ways.change)):
        named = private if number else {"api_name": "arena_next"}
        dealt = event(page.deal, asked, [voter, wanted, *ballot], js=WHO, **quick, **named)
        dealt.success(page.ahead, asked, None, show_progress="hidden", **slow)
    cancel.click(page.stop, None, None, queue=False, cancels=work, **private)
    for number, (button, choice) in enumerate(zip(buttons, [*"1234", TIE, BAD], strict=True)):
        picked = button.click(None, [order, ways], [order], js=picking(choice), **private)
        named = private if number else {"api_name": "arena_vote"}
        picked.then(page.vote, [token, order], [status, *names], **quick, **named)

    with gr.Accordion("Who is ahead, and votes to train on", open=False, elem_id="arena-board") as board:
        about = gr.Textbox("", show_label=False, lines=2, interactive=False, elem_id="arena-about")
        headers: Sequence[str] = ("Model", "Rating (95 %)", "Bradley-Terry (95 %)", "Won", "Votes")
        models = gr.Dataframe(headers=list(headers), datatype="str", interactive=False, elem_id="arena-models")
        headers = ("Voter", "Votes", "Agrees with most", "By chance", "")
        people = gr.Dataframe(headers=list(headers), datatype="str", interactive=False, elem_id="arena-voters")
        with gr.Row():
            refresh = gr.Button("Refresh", size="sm", elem_id="arena-refresh")
            save = gr.Button("Export votes", size="sm", elem_id="arena-export")
        saved = gr.File(label="Comparisons", interactive=False, elem_id="arena-file")
    gr.on([board.expand, refresh.click], page.board, None, [about, models, people], queue=False, **private)
    save.click(page.save, None, [about, saved], api_name="arena_export")


def picking(choice: str) -> str:
    """JavaScript: the order of choice after a button; one that was in it before begins anew."""
    if choice in (TIE, BAD):
        return f"() => ['{choice}']"
    begins = f"ways == 2 || order.length > 2 || order == '{TIE}' || order == '{BAD}' || order.includes('{choice}')"
    return f"(order, ways) => [{begins} ? '{choice}' : order + '{choice}']"
