"""Does PPD learn whose taste it is? Simulated users on the embedded model, some of them never trained on.

    python benchmarks/personal_embedded.py develop --output DIR --learning-rates 1e-3 --betas 5000 --steps 60 120
    python benchmarks/personal_embedded.py test --output DIR --seeds 0 1 2        # seeds can be shared out to processes
    python benchmarks/personal_embedded.py table --output DIR

A user likes pictures by three statistics (colourfulness, mean brightness, contrast), each standardised within a prompt:
vivid likes colour, pale likes light without colour, dark likes darkness. Each user's weights differ from their group's
by a personal draw, and each choice is made with noise. A user is known to the model by four choices. They choose among
four candidates a prompt: two of the model's pictures, each with two random exposures and saturations, as photographs
are edited; left alone, the model's pictures of a prompt differ in little but their finish.

Of every seed: 30 users train and 60 others are new; prompts of training pairs, of the new users' four pairs and of the
evaluation are disjoint. `develop` looks at development prompts with users of its own. `test` runs the recipe as it
stands (recipes/embedded_ppd.py). `table` pools the seeds and writes personal.md and personal.json.
"""

import argparse
import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mmalign
from mmalign.commands import quiet_libraries
from mmalign.data.users import Users, write_users
from mmalign.embedded import SAMPLING, path
from mmalign.embedded import prompts as embedded_prompts
from mmalign.evaluation.metrics import bootstrap_interval, colourfulness, spearman, wins
from mmalign.modalities.taste import PAIRS, PictureTaste, embed
from mmalign.quickstart import spread
from mmalign.recipe import load_recipe
from mmalign.records import Comparison
from mmalign.storage import read_json, write_json
from mmalign.surrogate import Cond, NoisedProbe
from mmalign.surrogate.draws import generator
from mmalign.training.loop import train, versions

GROUPS = {"vivid": (1.0, 0.0, 0.0), "pale": (-0.7, 0.7, 0.0), "dark": (0.0, -1.0, 0.0)}
PERSONAL, CHOICE = 0.25, 0.3  # deviations of a user's weights, and of a single choice
TRAINING_USERS, NEW_USERS, PAIRS_EACH = 30, 60, 16
TRAINING_PROMPTS, NEW_PROMPTS, PICTURES, EDITS = 120, 40, 2, 2
CANDIDATES = PICTURES * EDITS
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SETTINGS = {**SAMPLING, "batch_size": 32}


def statistics(picture) -> np.ndarray:
    """Colourfulness, mean brightness and contrast of a picture."""
    pixels = np.asarray(picture, float)
    grey = pixels @ (0.299, 0.587, 0.114)
    return np.array([colourfulness(pixels), grey.mean(), grey.std()])


def edited(picture, draw) -> Image.Image:
    """A picture with another exposure (up to 0.7 stops either way) and saturation (0.4 to 1.6)."""
    pixels = np.asarray(picture, float) / 255
    pixels = pixels ** (2 ** draw.uniform(-0.7, 0.7))
    grey = (pixels @ (0.299, 0.587, 0.114))[..., None]
    pixels = grey + draw.uniform(0.4, 1.6) * (pixels - grey)
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))


class Person:
    """A simulated user: a group's taste with personal weights; `scale` makes the statistics comparable."""

    def __init__(self, number: int, seed: int, scale: np.ndarray):
        self.name, self.group = f"user-{number}", list(GROUPS)[number % len(GROUPS)]
        self.draw = generator("person", seed, number)
        self.weights = (np.array(GROUPS[self.group]) + PERSONAL * self.draw.standard_normal(3)) / scale

    def score(self, pictures) -> np.ndarray:
        """What they think of pictures [N], without the noise of a choice."""
        return np.array([statistics(picture) for picture in pictures]) @ self.weights

    def pair(self, number: int, prompt: str, candidates, values: np.ndarray) -> Comparison:
        """Best and worst of the candidates, chosen with noise; `values` are the candidates' statistics."""
        liked = values @ self.weights + CHOICE * self.draw.standard_normal(len(values))
        best, worst = int(liked.argmax()), int(liked.argmin())
        media = (candidates[best], candidates[worst])
        return Comparison(f"{self.name}-{number}", prompt, media, (1, 0), user=self.name)


class World:
    """A seed's candidates, people, their choices and their embeddings."""

    def __init__(self, modality, seed: int):
        prompts = spread(embedded_prompts("pairs"), TRAINING_PROMPTS + NEW_PROMPTS, seed)
        assert len(set(prompts)) == len(prompts)
        flat = [prompt for prompt in prompts for _ in range(PICTURES)]
        made = modality.generate(flat, seeds=[2_000_000 * (seed + 1) + i for i in range(len(flat))], **SETTINGS)
        draw = generator("edits", seed)
        pictures = [edited(picture, draw) for picture in made for _ in range(EDITS)]
        values = np.array([statistics(p) for p in pictures]).reshape(len(prompts), CANDIDATES, -1)
        scale = (values - values.mean(1, keepdims=True)).std((0, 1))
        people = [Person(number, seed, scale) for number in range(TRAINING_USERS + NEW_USERS)]
        self.training, self.new = people[:TRAINING_USERS], people[TRAINING_USERS:]
        self.pairs: list[Comparison] = []
        encoder, vectors = PictureTaste(mmalign.load_scorer("embedded-clip"), "embedded-clip"), {}
        for person in people:
            known = person in self.training
            rows, count = (range(TRAINING_PROMPTS), PAIRS_EACH) if known else (range(TRAINING_PROMPTS, len(prompts)), 4)
            own = []
            for number, row in enumerate(person.draw.choice(rows, count, replace=False)):
                candidates = pictures[row * CANDIDATES : (row + 1) * CANDIDATES]
                own.append(person.pair(number, prompts[row], candidates, values[row]))
            vectors[person.name] = embed(own[:PAIRS], encoder)
            self.pairs += own if known else []
        self.users = Users(vectors, encoder.facts)

    def told_apart(self) -> list[float]:
        """Of every new user, whether the nearest of the groups' centroids over training users is their own group's."""
        centroids = {
            group: torch.stack([self.users[p.name] for p in self.training if p.group == group]).mean(0)
            for group in GROUPS
        }
        nearest = [
            min(centroids, key=lambda group: (self.users[p.name] - centroids[group]).norm().item()) for p in self.new
        ]
        return [float(found == person.group) for found, person in zip(nearest, self.new, strict=True)]


def trained(run, world: World, folder: Path, watch=None):
    """The modality after a fresh run, and the seconds it took; `watch(modality, step)` is called after every step."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_users(folder / "made.safetensors", world.users)
    modality = mmalign.load(run.pretrained_model_name_or_path)
    started = time.monotonic()
    told = (lambda step, metrics: watch(modality, step)) if watch else None
    run = replace(run, output_dir=str(folder / "run"), users=str(folder / "made.safetensors"))
    train(run, modality=modality, comparisons=world.pairs, watch=told, say=lambda line: None)
    return modality, time.monotonic() - started


def pictures_for(modality, vectors, prompts):
    """One list of pictures a vector: the same prompts and seeds for each."""
    who = torch.stack(list(vectors)).repeat_interleave(len(prompts), 0)
    seeds = list(range(len(prompts))) * len(vectors)
    made = modality.generate(prompts * len(vectors), seeds=seeds, user=who, **SETTINGS)
    return [made[i : i + len(prompts)] for i in range(0, len(made), len(prompts))]


def judge(modality, world: World, prompts: list[str], people) -> dict:
    """New users' pictures against the base's and against those made for users of other groups."""
    base = modality.generate(prompts, seeds=list(range(len(prompts))), **SETTINGS)
    own = dict(zip(people, pictures_for(modality, [world.users[p.name] for p in people], prompts), strict=True))
    clip = mmalign.load_scorer("embedded-clip")
    text = clip.score(base, prompts).numpy()
    rows = []
    for person in people:
        mine = person.score(own[person])
        others = {other.name: other for other in people if other.group != person.group}
        rows.append({
            "user": person.name,
            "group": person.group,
            "over_base": wins(person.score(base), mine).tolist(),
            "change": (mine - person.score(base)).tolist(),
            "over_others": [wins(person.score(own[o]), mine).tolist() for o in others.values()],
            "text": wins(text, clip.score(own[person], prompts).numpy()).tolist(),
        })  # fmt: skip
    return {"rows": rows, "zero_is_base": zero_is_base(modality, world, base), "base": base, "pictures": own}


def zero_is_base(modality, world: World, pictures) -> bool:
    """Whether the trained network gives nobody and a zero embedding the same, bit for bit, and a user another."""
    items = [Comparison(f"zero-{i}", "a red car", (picture,), (1,)) for i, picture in enumerate(pictures[:8])]
    encoded = modality.encode(items)
    t, noise = torch.arange(8) * 125, torch.randn(encoded.x0.shape, generator=torch.Generator().manual_seed(0))

    def predicted(user):
        entries = {**encoded.cond, "user": user.expand(8, -1)}
        probe = NoisedProbe(modality.path, encoded.x0, t, noise, Cond(entries, frozenset({"user"})))
        with torch.no_grad():
            return modality.predict(probe, "policy"), modality.predict(probe, "reference")

    heard = predicted(world.users[world.new[0].name])
    return torch.equal(*predicted(torch.zeros(world.users.features))) and not torch.equal(*heard)


def sheet(file: Path, result: dict, columns: int = 8) -> None:
    """The base's pictures in the first row, then a row a user: one of each group, twice."""
    rows = [result["base"], *itertools.islice(result["pictures"].values(), 2 * len(GROUPS))]
    picture = Image.new("RGB", (64 * columns, 64 * len(rows)))
    for (y, row), x in itertools.product(enumerate(rows), range(columns)):
        picture.paste(row[x], (64 * x, 64 * y))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(file)


def interpolated(modality, world: World, prompts: list[str], people, own) -> list[dict]:
    """Between users of two groups, at five points: how much more the second likes the pictures than the first."""
    found = []
    for one, other in itertools.combinations(people, 2):
        if one.group == other.group:
            continue
        a, b = world.users[one.name], world.users[other.name]
        inner = pictures_for(modality, [(1 - w) * a + w * b for w in POINTS[1:-1]], prompts)
        sides = [own[one][: len(prompts)], *inner, own[other][: len(prompts)]]
        values = [float((other.score(pictures) - one.score(pictures)).mean()) for pictures in sides]
        found.append({"users": [one.name, other.name], "values": values, "spearman": spearman(POINTS, values)})
    return found


def summary(rows) -> str:
    """Win rates of a look, in one line."""
    shown = {name: np.mean([np.mean(r[name]) for r in rows]) for name in ("over_base", "over_others", "text")}
    groups = {g: np.mean([np.mean(r["over_base"]) for r in rows if r["group"] == g]) for g in GROUPS}
    return ", ".join(f"{name} {value:.1%}" for name, value in (shown | groups).items())


def develop(arguments, run) -> None:
    """Every combination of the given settings, looked at after each of the given steps."""
    world = World(mmalign.load(run.pretrained_model_name_or_path), seed=1000)
    apart = world.told_apart()
    print(f"told apart {np.mean(apart):.1%} of {len(apart)}; {len(world.pairs)} pairs", flush=True)
    prompts, last = spread(embedded_prompts("development"), 12, seed=0), max(arguments.steps)
    for rate, beta in itertools.product(arguments.learning_rates, arguments.betas):
        name = f"lr {rate:g}, beta {beta:g}"
        tried = replace(run, objective=replace(run.objective, beta=beta), learning_rate=rate, max_train_steps=last)

        def look(modality, step, name=name):
            if step in arguments.steps:
                result = judge(modality, world, prompts, world.new[:9])
                print(f"{name}, {step} steps: {summary(result['rows'])}", flush=True)
                sheet(arguments.output / f"{name.replace(' ', '-')}-{step}.png", result)

        _, seconds = trained(tried, world, arguments.output / name.replace(" ", "-"), look)
        print(f"{name}: {seconds:.0f} s with looks", flush=True)


def test(arguments, run) -> None:
    """The recipe as it stands, over seeds; the test prompts are looked at here alone."""
    prompts = spread(embedded_prompts("test"), 20, seed=0)
    for seed in arguments.seeds:
        world = World(mmalign.load(run.pretrained_model_name_or_path), seed)
        modality, seconds = trained(replace(run, seed=seed), world, arguments.output / f"run-{seed}")
        result = judge(modality, world, prompts, world.new[:12])
        sheet(arguments.output / f"seed-{seed}.png", result)
        own = result.pop("pictures")
        del result["base"]
        between = interpolated(modality, world, prompts[:8], world.new[:5], own)
        record = {**result, "told_apart": world.told_apart(), "interpolation": between, "seconds": seconds}
        write_json(arguments.output / f"seed-{seed}.json", {**record, "run": run.resolved(), "versions": versions()})
        print(f"seed {seed}: {summary(record['rows'])}", flush=True)


def figures(record) -> dict[str, tuple[list[float], list[str]]]:
    """Measure -> values and the clusters that intervals draw whole: users, or pairs of users."""
    rows = record["rows"]
    found: dict[str, tuple[list[float], list[str]]] = {}
    measures = {
        "over_base": "over the base",
        "over_others": "over other groups' users",
        "change": "change of the user's score",
        "text": "text alignment over the base",
    }
    for name, about in measures.items():
        for group in (None, *GROUPS) if name != "text" else (None,):
            chosen = [row for row in rows if group in (None, row["group"])]
            values = [np.ravel(row[name]).tolist() for row in chosen]
            clusters = [row["user"] for row, v in zip(chosen, values, strict=True) for _ in v]
            found[f"{about}{f', {group}' if group else ''}"] = ([v for row in values for v in row], clusters)
    apart = record["told_apart"]
    found["told apart by embedding (chance 1/3)"] = (apart, [f"new-{i}" for i in range(len(apart))])
    between = record["interpolation"]
    found["interpolation, Spearman"] = ([b["spearman"] for b in between], ["+".join(b["users"]) for b in between])
    return found


def table(arguments, run) -> None:
    """Every seed that `test` wrote, and all of them pooled."""
    records = {int(f.stem.split("-")[1]): read_json(f) for f in sorted(arguments.output.glob("seed-*.json"))}
    by_seed = {seed: figures(record) for seed, record in sorted(records.items())}
    lines = ["| measure | " + " | ".join(f"seed {seed}" for seed in by_seed) + " | all seeds | n | 95 % |"]
    lines.append("| --- " * (len(by_seed) + 4) + "|")
    kept = {}
    for name in next(iter(by_seed.values())):
        values = [value for found in by_seed.values() for value in found[name][0]]
        clusters = [f"{seed}-{c}" for seed, found in by_seed.items() for c in found[name][1]]
        low, high = bootstrap_interval(np.array(values), clusters=clusters)
        if min(values) == max(values) == 1:  # resampling cannot show the doubt: Clopper and Pearson's bound
            low = 0.025 ** (1 / len(set(clusters)))
            low = 2 * low - 1 if "Spearman" in name else low  # the rest could be as low as -1
        means = {seed: float(np.mean(found[name][0])) for seed, found in by_seed.items()}
        kept[name] = {"seeds": means, "mean": float(np.mean(values)), "n": len(values), "interval": [low, high],
                      "clusters": len(set(clusters))}  # fmt: skip
        shown = (lambda v: f"{v:.2f}") if "Spearman" in name or "change" in name else (lambda v: f"{v:.1%}")
        seeds = " | ".join(shown(value) for value in means.values())
        lines.append(f"| {name} | {seeds} | {shown(np.mean(values))} | {len(values)} | {shown(low)} to {shown(high)} |")
    any_record = next(iter(records.values()))
    hidden = ("pretrained_model_name_or_path", "output_dir", "users")
    settings = {name: value for name, value in any_record["run"].items() if name not in hidden}
    facts = {
        "zero_is_base": all(record["zero_is_base"] for record in records.values()),
        "seconds": {seed: record["seconds"] for seed, record in records.items()},
    }
    write_json(arguments.output / "personal.json", {
        "figures": kept, **facts, "run": settings, "versions": any_record["versions"],
    })  # fmt: skip
    (arguments.output / "personal.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), facts, sep="\n")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["develop", "test", "table"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--betas", type=float, nargs="+", default=[5000])
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 120])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    run = replace(load_recipe("embedded_ppd"), pretrained_model_name_or_path=str(path()))
    {"develop": develop, "test": test, "table": table}[arguments.stage](arguments, run)


if __name__ == "__main__":
    main()
