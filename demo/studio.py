"""What the tabs share: the models and scorers that the demo was started with, loaded at first use, and its limits."""

import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmalign
from mmalign import embedded
from mmalign.commands import quiet_libraries
from mmalign.data.prompts import read_prompts
from mmalign.records import Text, UserError, image_size, open_image

MAX_PROMPT, MAX_SEED, MAX_STEPS, MAX_GUIDANCE, MAX_STRENGTH = 300, 2**31 - 1, 50, 20.0, 2.0
MAX_SIDE = 4096  # pixels of an uploaded picture, each way
USUAL_SAMPLING = {"num_inference_steps": 30, "guidance_scale": 5.0}  # for models other than the embedded one
BATCH = 8  # media that a scorer is asked of at once, so that it can be cancelled in between


class Stopped(Exception):
    """The visitor pressed Cancel."""


@dataclass(frozen=True)
class Entry:
    """A model of the start-up list.

    Attributes:
        name: what the page calls it.
        source: pipeline folder, single file or hub id.
        lora: LoRA file or folder, or a run's output folder with user layers.
    """

    name: str
    source: str
    lora: str | None = None

    @property
    def user_layers(self) -> str | None:
        """The folder of user layers: such a model can be told whom it makes media for."""
        return self.lora if self.lora and (Path(self.lora) / "user_layers.safetensors").is_file() else None

    @property
    def may_answer(self) -> bool:
        """Whether it may be a model of text answers, which takes input pictures; known before it is loaded."""
        path = Path(self.source)
        return not path.exists() or (path / "config.json").is_file()

    @property
    def about(self) -> dict[str, str]:
        """What visitors may know: not where it lies on this machine."""
        return {key: Path(value).name for key, value in (("source", self.source), ("lora", self.lora)) if value}


def entries(base: str | None, loras: Sequence[str], models: Sequence[str]) -> dict[str, Entry]:
    """The start-up list: the base, its LoRAs, and other models.

    Args:
        base: pipeline folder, single file or hub id; None for the embedded model.
        loras: of the base, each [NAME=]PATH.
        models: each NAME=SOURCE[+LORA].

    Raises:
        UserError: a name is missing or given twice.
    """
    base = base or str(embedded.path())
    found = [Entry("base", base)]
    for text in loras:
        name, path = named(text)
        found.append(Entry(name or Path(path).resolve().name.removesuffix(".safetensors"), base, path))
    for text in models:
        name, rest = named(text)
        if not name:
            raise UserError(f"--model {text}: write NAME=SOURCE, such as aligned=run/aligned.")
        source, _, lora = (rest, "", "") if Path(rest).exists() else rest.partition("+")
        found.append(Entry(name, str(embedded.path()) if source == "embedded" else source, lora or None))
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two models are called {name!r}; write NAME=PATH to tell them apart.")
    return {entry.name: entry for entry in found}


def named(text: str) -> tuple[str, str]:
    """The name, if there is one, and the path of [NAME=]PATH; a path that exists is taken as it is."""
    name, _, rest = text.rpartition("=") if re.match(r"[^/\\=]+=", text) and not Path(text).exists() else ("", "", text)
    return name, rest


class Studio:
    """The models, adapters and scorers of one demo.

    Args:
        base: see `entries`.
        loras: see `entries`.
        models: see `entries`.
        data_dir: of votes, users and kept media; made when missing.
        runs_dir: where the output folders of training lie.
        prompts: file of those that the Arena asks about; default, of the embedded model, those it is aligned on.

    Raises:
        UserError: as `entries`, or the prompts cannot be read.
    """

    def __init__(
        self,
        base: str | None = None,
        loras: Sequence[str] = (),
        models: Sequence[str] = (),
        data_dir: str | Path = "mmalign-demo",
        runs_dir: str | Path = ".",
        prompts: str | Path | None = None,
    ) -> None:
        self.entries = entries(base, loras, models)
        self.data_dir, self.runs_dir = Path(data_dir).resolve(), Path(runs_dir).resolve()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.examples = [] if base else embedded.prompts("test")[::97][:4]
        # Votes become training data: the Arena asks about no prompts that models are tested on
        self.prompts = [one.text for one in read_prompts(prompts)] if prompts else []
        self.prompts = self.prompts or ([] if base else embedded.prompts("pairs"))
        self.sampling: Mapping[str, Any] = USUAL_SAMPLING if base else embedded.SAMPLING
        self._cache = tempfile.TemporaryDirectory(prefix="mmalign-demo-")  # uploads, and what is shown; goes at the end
        self.cache = Path(self._cache.name).resolve()
        self.lock = threading.RLock()  # one medium is made at a time, and what is loaded is loaded once
        self._modalities: dict[tuple[str, str | None], Any] = {}
        self._scorers: dict[str, Any] = {}
        self._jobs: set[tuple[str | None, threading.Event]] = set()

    @property
    def names(self) -> list[str]:
        """Of the models, the base first."""
        return list(self.entries)

    def entry(self, name: str) -> Entry:
        """A model of the start-up list.

        Raises:
            UserError: it is not in the list, whatever a client sends.
        """
        if name not in self.names:
            raise UserError(f"There is no such model; choose of {', '.join(self.names)}.")
        return self.entries[name]

    def modality_of(self, name: str) -> Any:
        """The model behind a name, loaded if need be, with the adapter of that name if it has one.

        Entries of one base share its weights; those with user layers have their own.

        Raises:
            UserError: it is not in the list, or cannot be loaded.
        """
        entry = self.entry(name)
        with self.lock:
            key = (entry.source, entry.user_layers)
            if key not in self._modalities:
                quiet_libraries()
                self._modalities[key] = mmalign.load(entry.source, user_layers=entry.user_layers)
            modality = self._modalities[key]
            adapter = self._adapter(entry)
            if adapter and adapter not in getattr(modality.network, "peft_config", {}):
                modality.load_adapter(entry.lora, adapter)
            return modality

    def _adapter(self, entry: Entry) -> str | None:
        """What its adapter is called on the network; None without one. PEFT takes no dots."""
        only_layers = entry.user_layers and not list(Path(entry.user_layers).glob("*lora*.safetensors"))
        return None if not entry.lora or only_layers else f"entry{self.names.index(entry.name)}"

    def make(
        self,
        name: str,
        prompt: str,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
        strength: float = 1.0,
        *,
        user: Any = None,
        images: Sequence[Any] = (),
        progress: Callable[[float], None] | None = None,
    ) -> Any:
        """A medium of one model.

        Args:
            name: of the start-up list.
            prompt: what is asked for.
            seed: the same seed is the same noise for every model.
            steps: of sampling; None for the model's own. Answers have none.
            guidance: of the prompt, likewise.
            strength: what the adapter's weights are multiplied by; 0 is the base.
            user: whom it is for, an embedding [D]; the model needs user layers.
            images: input pictures, for models that answer.
            progress: told after each step the share that is done, in [0, 1]; what it raises ends the work.

        Raises:
            UserError: as `modality_of` and the model's `generate`.
        """
        with self.lock:
            modality = self.modality_of(name)
            if modality.medium == "answer":
                told: dict[str, Any] = {**embedded.VLM_SAMPLING, "images": [tuple(images)]}
                steps = told["max_new_tokens"]
            else:
                told = {"num_inference_steps": steps, "guidance_scale": guidance}
            told |= {} if user is None else {"user": user}
            with wearing(modality, self._adapter(self.entry(name)), strength), watched(modality, steps, progress):
                return modality.generate([prompt], seeds=[int(seed)], **told)[0]

    def scorer_cards(self) -> list[Any]:
        """The cards of the bundled scorers whose weights are on this machine, those of pictures first."""
        from mmalign.scoring.scorer import list_scorers
        from mmalign.scoring.weights import on_disk

        here = [card for card in list_scorers() if on_disk(card) is not None]
        return sorted(here, key=lambda card: card.judges != "image")

    def cards(self, names: Sequence[str]) -> list[Any]:
        """The cards of these scorers.

        Raises:
            UserError: one is not on this machine, whatever a client sends.
        """
        known = {card.name: card for card in self.scorer_cards()}
        if set(names) - set(known):
            raise UserError(f"There is no such scorer here; choose of {', '.join(known)}.")
        return [known[name] for name in names]

    def score(
        self,
        media: Sequence[Any],
        prompt: str,
        names: Sequence[str],
        *,
        images: Sequence[Any] = (),
        progress: Callable[[float], None] | None = None,
    ) -> dict[str, list[float]]:
        """What scorers say of media that were made for one prompt: scorer -> a score a medium.

        Args:
            media: of the kind that the scorers judge.
            prompt: of all.
            names: of the scorers.
            images: input pictures of the prompt.
            progress: as in `make`.

        Raises:
            UserError: as `cards`, or a medium cannot be read.
        """
        scores: dict[str, list[float]] = {name: [] for name in names}
        for number, card in enumerate(self.cards(names)):
            with self.lock:
                if card.name not in self._scorers:
                    self._scorers[card.name] = mmalign.load_scorer(card.folder)
                for start in range(0, len(media), BATCH):
                    if progress:
                        progress((number + start / len(media)) / len(names))
                    part = media[start : start + BATCH]
                    asked = {"conditions": [tuple(images)] * len(part)}
                    scores[card.name] += self._scorers[card.name].score(part, [prompt] * len(part), **asked).tolist()
        return scores

    def open(self, picture: str | bytes, name: str = "") -> Any:
        """An uploaded picture, upright RGB.

        Args:
            picture: its path or content.
            name: what to call it in an error; default that of its file.

        Raises:
            UserError: it is too large, or cannot be decoded.
        """
        name = name or Path(str(picture)).name  # and not where it lies
        if max(image_size(picture, name=name)) > MAX_SIDE:
            raise UserError(f"{name}: more than {MAX_SIDE} pixels wide or high; make the picture smaller.")
        return open_image(picture, name=name)

    def fresh(self, name: str) -> Path:
        """A path in the cache that nobody else has."""
        return Path(tempfile.mkdtemp(dir=self.cache)) / name

    def keep(self, medium: Any, name: str) -> str:
        """The file of a medium, for the page to show; of an answer its text.

        Args:
            medium: a picture, `Video`, `Sound` or `Text`.
            name: of the file, without suffix; anything but letters, digits, . and - is replaced.
        """
        if isinstance(medium, Text):
            return str(medium)
        from mmalign.data.candidates import KINDS, PICTURE, encoded

        _, suffix = KINDS.get(type(medium), PICTURE)
        path = self.fresh(re.sub(r"[^\w.-]", "_", name) + suffix)
        path.write_bytes(encoded(medium))
        return str(path)

    @contextmanager
    def job(self, session: str | None, show: Callable[..., Any]) -> Iterator[Callable[..., None]]:
        """A visitor's long work: gives what `make` takes as progress, which ends the work once `stop` was called."""
        cancelled = threading.Event()
        self._jobs.add((session, cancelled))

        def progress(share: float, *about: str) -> None:
            if cancelled.is_set():
                raise Stopped
            show(share, *about)

        try:
            yield progress
        finally:
            self._jobs.discard((session, cancelled))

    def stop(self, session: str | None) -> None:
        """Ends a visitor's long work at its next step."""
        for owner, running in list(self._jobs):
            if session and owner == session:
                running.set()


@contextmanager
def wearing(modality: Any, adapter: str | None, strength: float) -> Iterator[None]:
    """The network with one of its adapters, times `strength`, or with none."""
    from mmalign.training.views import WeightViews, adapter_layers

    layers = adapter_layers(modality.network)
    if not layers:
        yield
        return
    scaled = [layer for layer in layers if adapter in layer.scaling]
    before = [layer.scaling[adapter] for layer in scaled]
    try:
        for layer in scaled:
            layer.scaling[adapter] *= strength
        with WeightViews(modality)(adapter or "reference"):
            yield
    finally:
        for layer, scale in zip(scaled, before, strict=True):
            layer.scaling[adapter] = scale


@contextmanager
def watched(modality: Any, steps: int | None, progress: Callable[[float], None] | None) -> Iterator[None]:
    """Tells `progress` before every pass of the network; pipelines tell nothing until a medium is finished."""
    passes = 0

    def tell(*_: Any) -> None:
        nonlocal passes
        progress(min(1.0, passes / (steps or USUAL_SAMPLING["num_inference_steps"])))
        passes += 1

    hook = modality.unwrapped.register_forward_pre_hook(tell) if progress else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
