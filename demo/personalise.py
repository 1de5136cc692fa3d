"""The tab Personalise: a visitor's taste from a few choices between two pictures, and pictures for it."""

import functools
import random
import re
from html import escape
from typing import Any

import gradio as gr
from compare import check, new_seed
from studio import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, MAX_STEPS, Stopped, Studio

from mmalign import embedded
from mmalign.data.users import USERS_FILE, Users, read_users
from mmalign.personal import PAIRS, STABLE, Choices, add_users, between, load_encoder
from mmalign.records import UserError

MAX_PROMPTS, MAX_CHOICES, MAX_USERS = 50, 200, 1000
NAME = re.compile(r"[^\W\d_][\w .+@-]{0,39}")
NOBODY = "nobody"  # of the blend
HOW = """Which of two pictures do you like better? A few choices make a taste: an *embedding*. It is stable when one
more choice hardly changes it. Then give it a name."""
NO_LAYERS = """**No model of this page can be told whom it makes pictures for.** Train one by
`mmalign train embedded_ppd`, and start the demo with `--lora` and its output folder."""

encoder = functools.cache(functools.partial(load_encoder, "embedded-clip"))


class Personalise:
    """The event handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.file = studio.data_dir / USERS_FILE

    def users(self) -> Users:
        """Everybody who has an embedding here."""
        return read_users(self.file) if self.file.exists() else Users({})

    def refuse_pair(self, prompts: str, names: list[str], steps: float, guidance: float) -> None:
        """Shows what is wrong with what pairs are made of, and nothing else."""
        lines = lines_of(prompts)
        if not 0 < len(lines) <= MAX_PROMPTS:
            raise gr.Error(f"Write at most {MAX_PROMPTS} prompts, one a line.")
        for line in lines:
            check(line, 0, steps, guidance)
        if not names:
            raise gr.Error("Choose a model that makes the pictures.")
        try:
            for name in names:
                self.studio.entry(name)
        except UserError as error:
            raise gr.Error(escape(str(error))) from error

    def pair(
        self, prompts: str, names: list[str], steps: float, guidance: float, request: gr.Request,
        show: gr.Progress = gr.Progress(),  # noqa: B008 gradio finds it by its default
    ) -> tuple[Any, ...]:  # fmt: skip
        """A prompt and two pictures of it, by two of the models if there are two."""
        self.refuse_pair(prompts, names, steps, guidance)
        prompt = random.choice(lines_of(prompts))
        makers = random.sample(names, 2) if len(names) > 1 else names * 2
        pictures = self.make([(name, prompt, new_seed(), steps, guidance, None) for name in makers], request, show)
        return (prompt, *pictures), *pictures, prompt

    def make(self, asked: list[tuple[Any, ...]], request: gr.Request, show: Any) -> list[Any]:
        """Pictures, each of (model, prompt, seed, steps, guidance, user)."""
        made: list[Any] = []
        try:
            with self.studio.job(request.session_hash, lambda part: show((len(made) + part) / len(asked))) as progress:
                for name, prompt, seed, steps, guidance, user in asked:
                    if (medium := self.studio.modality_of(name).medium) != "picture":
                        raise UserError(f"{name} makes {medium}s; choose a model of pictures.")
                    settings = (prompt.strip(), int(seed), int(steps), guidance)
                    made.append(self.studio.make(name, *settings, user=user, progress=progress))
        except Stopped:
            raise gr.Error("Cancelled.") from None
        except UserError as error:
            raise gr.Error(escape(str(error))) from error
        return made

    def refuse_choice(self, shown: tuple[Any, ...] | None, choices: Choices) -> None:
        """Shows what is wrong with a choice, and nothing else."""
        if shown is None:
            raise gr.Error("Ask for a pair first.")
        if len(choices.parts) >= MAX_CHOICES:
            raise gr.Error(f"{MAX_CHOICES} choices are enough; give the taste a name.")

    def choose(self, shown: tuple[Any, ...], choices: Choices, side: int) -> tuple[None, str, Choices, str]:
        """The visitor likes the picture of `side` better; then nothing is asked until there is another pair."""
        self.refuse_choice(shown, choices)
        prompt, *pictures = shown
        try:
            choices = choices.plus(prompt, pictures[side], pictures[1 - side], encoder())
        except UserError as error:
            raise gr.Error(escape(str(error))) from error
        return None, "", choices, told(choices)

    def stop(self, request: gr.Request) -> None:
        """Ends the work at its next step."""
        self.studio.stop(request.session_hash)

    def no_pair(self, request: gr.Request) -> tuple[Any, ...]:
        """Ends the making of a pair."""
        self.stop(request)
        return None, None, None, ""

    def listed(self) -> tuple[Any, Any]:
        """Everybody, for the two lists."""
        names = sorted(self.users().vectors)
        return gr.update(choices=names), gr.update(choices=[NOBODY, *names])

    def name(self, name: str, choices: Choices) -> None:
        """Stores the embedding."""
        name = (name or "").strip()
        if not NAME.fullmatch(name) or name == NOBODY:
            raise gr.Error("A name has at most 40 letters, digits, spaces and . + @ -, and begins with a letter.")
        if len(choices.parts) < PAIRS:
            raise gr.Error(f"{len(choices.parts)} choices so far; at least {PAIRS} are needed.")
        if len(self.users().vectors) >= MAX_USERS:
            raise gr.Error(f"There are {MAX_USERS} users already; ask whoever started the demo to remove some.")
        try:
            add_users(self.file, {name: choices.embedding}, encoder().facts, new=True)
        except UserError as error:
            raise gr.Error(escape(str(error))) from error
        gr.Info(f"{name} is stored.")

    def refuse_taste(
        self, model: str, one: str, other: str, weight: float, prompt: str, seed: float, steps: float, guidance: float
    ) -> None:
        """Shows what is wrong with what is asked for, and nothing else."""
        check(prompt, seed, steps, guidance)
        try:
            if not self.studio.entry(model).user_layers:
                raise gr.Error(f"{model} cannot be told whom it makes pictures for; choose another model.")
            self.taste(model, one, other, weight)
        except UserError as error:
            raise gr.Error(escape(str(error))) from error

    def taste(self, model: str, one: str, other: str, weight: float) -> Any:
        """The embedding [D] of a user, or of what lies between two.

        Raises:
            UserError: there is no such user, or the model was trained on embeddings of another kind.
        """
        users = self.users()
        if one not in users.vectors or other not in {NOBODY, *users.vectors}:
            raise UserError("Choose a taste of the list; the upper part of this page makes one.")
        trained = read_users(f"{self.studio.entry(model).user_layers}/{USERS_FILE}")
        if dict(users.facts) != dict(trained.facts):
            raise UserError(f"{model} knows embeddings of another encoder; make the users anew with that one.")
        if other == NOBODY:
            return users[one]
        if not 0 <= weight <= 1:
            raise UserError("The blend is between 0 and 1.")
        return between(users, one, other, weight)

    def generate(
        self, model: str, one: str, other: str, weight: float, prompt: str, seed: float, steps: float, guidance: float,
        request: gr.Request, show: gr.Progress = gr.Progress(),  # noqa: B008 gradio finds it by its default
    ) -> tuple[Any, Any]:  # fmt: skip
        """The picture for nobody and the one for the taste, from the same seed."""
        self.refuse_taste(model, one, other, weight, prompt, seed, steps, guidance)
        whose = one if other == NOBODY else f"{1 - weight:.0%} {one}, {weight:.0%} {other}"
        asked = [(model, prompt, seed, steps, guidance, user) for user in (None, self.taste(model, one, other, weight))]
        plain, personal = self.make(asked, request, show)
        return plain, gr.update(value=personal, label=f"For {whose}")


def lines_of(prompts: str) -> list[str]:
    """The lines that say something."""
    return [line.strip() for line in (prompts or "").splitlines() if line.strip()]


def told(choices: Choices) -> str:
    """How far the visitor is, in Markdown."""
    count = len(choices.parts)
    if count < 2:
        return f"{count} of at least {PAIRS} choices."
    state = "**stable**" if choices.stable else f"stable from {STABLE:.2f} on, after at least {PAIRS} choices"
    return f"{count} choices. Cosine with the embedding before the last one: **{choices.cosine:.3f}** ({state})."


def tab(studio: Studio) -> None:
    """Fills the tab."""
    page = Personalise(studio)
    choices, pair = gr.State(Choices()), gr.State()
    gr.Markdown(HOW)
    with gr.Row():
        examples = embedded.prompts("pairs")[::97][:8] if studio.examples else []
        prompts = gr.Textbox(
            "\n".join(examples),
            lines=4,
            max_lines=8,
            label="Prompts, one a line",
            min_width=240,
            elem_id="personal-prompts",
        )
        names = gr.CheckboxGroup(studio.names, value=studio.names[:2], label="Models that make the pictures")
    with gr.Accordion("Sampling", open=False, elem_id="personal-sampling"), gr.Row():
        steps = gr.Slider(
            1, MAX_STEPS, studio.sampling["num_inference_steps"], step=1, label="Steps", elem_id="personal-steps"
        )
        guidance = gr.Slider(1, MAX_GUIDANCE, studio.sampling["guidance_scale"], step=0.5, label="Guidance")
    with gr.Row():
        go = gr.Button("Show a pair", variant="primary", size="sm", elem_id="personal-pair")
        stop = gr.Button("Cancel", size="sm", elem_id="personal-cancel")
        again = gr.Button("Forget my choices", size="sm", elem_id="personal-again")
    asked = gr.Textbox(label="Which do you like better for", lines=2, interactive=False, elem_id="personal-asked")
    pictures, likes = [], []
    with gr.Row():
        for side, place in enumerate(("left", "right")):
            with gr.Column(min_width=140):
                pictures.append(picture(f"The {place} one", f"personal-picture-{side}"))
                likes.append(gr.Button(f"I like the {place} one", elem_id=f"personal-like-{side}"))
    progress = gr.Markdown(told(Choices()), elem_id="personal-progress")
    with gr.Row(equal_height=True):
        name = gr.Textbox(label="Name of this taste", max_length=40, scale=4, min_width=240, elem_id="personal-name")
        save = gr.Button("Store", size="sm", scale=1, min_width=120, elem_id="personal-save")
    private = {"api_visibility": "private"}
    shared = {"concurrency_id": "models", "show_progress_on": pictures}
    making = [prompts, names, steps, guidance]
    shown = [pair, *pictures, asked]
    first = go.click(page.refuse_pair, making, None, **private)
    work = [first.success(page.pair, making, shown, **shared, **private)]
    for side, like in enumerate(likes):
        checked = like.click(page.refuse_choice, [pair, choices], None, **private)
        chosen = checked.success(
            functools.partial(page.choose, side=side), [pair, choices], [pair, asked, choices, progress], **private
        )
        work.append(chosen.success(page.pair, making, shown, **shared, **private))
    again.click(lambda: (Choices(), told(Choices())), None, [choices, progress], **private)
    stop.click(page.no_pair, None, shown, queue=False, cancels=work, **private)

    gr.Markdown("### Pictures for a taste")
    models = [model for model in studio.names if studio.entry(model).user_layers]
    with gr.Column(visible=bool(models)):
        with gr.Row():
            model = gr.Dropdown(models, value=(models or [None])[0], label="Model", elem_id="personal-model")
            one = gr.Dropdown([], label="Taste", elem_id="personal-one")
            other = gr.Dropdown([NOBODY], value=NOBODY, label="Blended with", elem_id="personal-other")
            weight = gr.Slider(0, 1, 0.5, step=0.05, label="Share of the other", elem_id="personal-weight")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                (studio.examples or [""])[0],
                label="Prompt",
                max_length=MAX_PROMPT,
                scale=5,
                min_width=240,
                elem_id="personal-prompt",
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=1, min_width=90)
        with gr.Row():
            make = gr.Button("Generate", variant="primary", size="sm", elem_id="personal-go")
            end = gr.Button("Cancel", size="sm")
        with gr.Row():
            made = [picture("For nobody", "personal-plain"), picture("For this taste", "personal-made")]
    if not models:
        gr.Markdown(NO_LAYERS, elem_id="personal-none")
    given = [model, one, other, weight, prompt, seed, steps, guidance]
    made_for = make.click(page.refuse_taste, given, None, **private).success(
        page.generate, given, made, concurrency_id="models", api_name="personal"
    )
    end.click(page.stop, None, None, queue=False, cancels=made_for, **private)
    stored = save.click(page.name, [name, choices], None, **private)
    stored.success(page.listed, None, [one, other], **private)
    gr.on(None, page.listed, None, [one, other], **private)  # whenever the page is loaded


def picture(label: str, name: str) -> gr.Image:
    """A place for a picture."""
    look = {"height": 320, "elem_classes": "picture", "elem_id": name}
    return gr.Image(label=label, format="png", interactive=False, buttons=["download"], **look)
