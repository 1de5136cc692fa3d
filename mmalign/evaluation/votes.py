"""Votes that people cast blind: kept in SQLite, turned into ratings, and used to choose what is shown next.

A sample is what a model made for a prompt and settings (the seed is one of them); samples of one prompt and settings
can be shown side by side. A ballot is what a voter is shown; it is open until they vote, and then it is a vote.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import secrets
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmalign.evaluation.metrics import bradley_terry
from mmalign.records import UserError
from mmalign.storage import atomic_file, sha256

VOTES_FILE = "votes.sqlite"
Z = 1.96  # of a 95 % interval
TIE, BAD = "0", "x"
SCHEMA = """
CREATE TABLE IF NOT EXISTS samples (prompt TEXT, settings TEXT, owner TEXT, model TEXT, file TEXT,
    PRIMARY KEY (prompt, settings, owner, model)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ballots (token TEXT PRIMARY KEY, voter TEXT UNIQUE, prompt TEXT, settings TEXT,
    models TEXT, files TEXT);
CREATE TABLE IF NOT EXISTS votes (token TEXT UNIQUE, voter TEXT, prompt TEXT, settings TEXT, models TEXT, files TEXT,
    time REAL, places TEXT, bad INTEGER, number INTEGER PRIMARY KEY);
CREATE INDEX IF NOT EXISTS seen ON votes (voter, prompt, settings);
"""


@dataclass(frozen=True)
class Ballot:
    """What a voter is shown, in the order shown; K = 2 media or more.

    Attributes:
        token: what the vote is cast with; it names no model, and only the server can make one.
        voter: hash of who it is for.
        prompt: of the media.
        settings: of the sampling, the same for all.
        models: [K] who made them.
        files: [K] names in the media folder, which are hashes of the content.
    """

    token: str
    voter: str
    prompt: str
    settings: dict[str, Any]
    models: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Vote(Ballot):
    """A ballot and what was said of it.

    Attributes:
        time: in seconds since 1970.
        places: [K] each medium's place, 1 is the best; equal ones tie.
        bad: all were called bad; the places are then equal.
        number: counts up.
    """

    time: float
    places: tuple[int, ...]
    bad: bool
    number: int


class Votes:
    """The votes of a folder, for any number of threads and processes.

    Args:
        folder: of `votes.sqlite`, `salt` and `media/`; made when missing.

    Raises:
        UserError: `votes.sqlite` is something else.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.media = self.folder / "media"
        self.media.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._ratings: Ratings | None = None
        self._rated = 0  # number of the last vote that is in them
        path = self.folder / VOTES_FILE
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level="IMMEDIATE", check_same_thread=False)
            # FULL: what is acknowledged also outlives the machine's power; NORMAL would do for a killed process
            self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {SCHEMA}")
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: holds no votes ({error}); give another folder, or mend the file.") from error
        self._salt = self._read_salt()

    def _read_salt(self) -> bytes:
        path = self.folder / "salt"
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")  # of two processes that start at once, one makes it
            if not path.exists():
                with atomic_file(path) as temp:
                    temp.touch(0o600)
                    temp.write_bytes(secrets.token_bytes(32))
        return path.read_bytes()

    def voter(self, name: str) -> str:
        """16 hex digits that stand for a person; without the folder's salt nobody can try names out."""
        return hashlib.blake2b(name.encode(), key=self._salt, digest_size=8).hexdigest()

    def keep(self, content: bytes, ending: str) -> str:
        """Writes a file into the media folder, if it is not there yet; the name is a hash of the content."""
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.{ending}"
        if not (self.media / name).exists():
            with atomic_file(self.media / name) as temp:
                temp.write_bytes(content)
        return name

    def whole(self, name: str) -> bool:
        """Whether a file of the media folder is there and as it was written."""
        path = self.media / name
        return path.is_file() and sha256(path).startswith(path.stem)

    def add(self, prompt: str, settings: Mapping[str, Any], files: Mapping[str, str], owner: str = "") -> None:
        """Puts samples into stock.

        Args:
            prompt: of all of them.
            settings: likewise; what JSON holds.
            files: model -> name in the media folder.
            owner: the only voter who may be shown them; default everybody.
        """
        told = json.dumps(settings, sort_keys=True)
        rows = [(prompt, told, owner, model, file) for model, file in files.items()]
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?)", rows)

    def ballot(self, token: str) -> Ballot | None:
        """The open ballot of a token."""
        return next(iter(self._read(Ballot, "WHERE token = ?", token)), None)

    def _read(self, kind: Any, which: str, value: Any) -> list[Any]:
        table = "ballots" if kind is Ballot else "votes"
        with self._lock:
            rows = self._db.execute(f"SELECT * FROM {table} {which}", (value,)).fetchall()
        lists = {"settings": dict, "models": tuple, "files": tuple, "places": tuple}
        named = (dict(zip(kind.__dataclass_fields__, row, strict=True)) for row in rows)
        return [
            kind(**{name: lists[name](json.loads(value)) if name in lists else value for name, value in row.items()})
            for row in named
        ]

    def issue(
        self,
        voter: str,
        models: Sequence[str],
        ways: int = 2,
        *,
        prompt: str | None = None,
        seed: int | None = None,
    ) -> Ballot | None:
        """The next ballot of a voter, of what is in stock; None if they have judged all of it.

        Who names their maker after the vote cannot show the same media blind again, so nobody gets a prompt and
        settings twice. A voter's open ballot is given again: else one could ask until one likes what there is to judge.

        Args:
            voter: hash.
            models: to choose from.
            ways: media on the ballot.
            prompt: a voter's own, whose samples only they see; default those of everybody.
            seed: of what is left to chance: which of the samples, and in which order.
        """
        rng = random.Random(seed)
        with self._lock:
            for open_one in self._read(Ballot, "WHERE voter = ?", voter):
                if len(open_one.models) == ways and prompt in (None, open_one.prompt) and self._there(open_one.files):
                    return open_one
            stock = self._stock(voter, models, prompt)
            for chosen in matchups(self.ratings(), models, ways, rng):
                order = rng.sample(chosen, ways)
                items = [(item, [files.get(model) for model in order]) for item, files in stock.items()]
                for item, files in rng.sample(items, len(items)):
                    # two models may make the very same: there is nothing to choose between
                    if None not in files and len(set(files)) == ways and self._there(files):
                        row = (secrets.token_hex(16), voter, *item, json.dumps(order), json.dumps(files))
                        with self._db:
                            self._db.execute("INSERT OR REPLACE INTO ballots VALUES (?, ?, ?, ?, ?, ?)", row)
                        return self.ballot(row[0])
        return None

    def waiting(self, voter: str, models: Sequence[str], ways: int) -> int:
        """How much a voter has not judged of what everybody may be shown."""
        with self._lock:
            return sum(len(set(files.values())) >= ways for files in self._stock(voter, models, None).values())

    def _there(self, files: Iterable[str]) -> bool:
        return all((self.media / file).is_file() for file in files)

    def _stock(self, voter: str, models: Sequence[str], prompt: str | None) -> dict[tuple, dict[str, str]]:
        """(prompt, settings) -> model -> file, of what a voter has not judged."""
        query = """SELECT prompt, settings, model, file FROM samples WHERE owner = ?1 AND (?2 IS NULL OR prompt = ?2)
            AND NOT EXISTS (SELECT 1 FROM votes
                WHERE voter = ?3 AND votes.prompt = samples.prompt AND votes.settings = samples.settings)"""
        found: dict[tuple, dict[str, str]] = defaultdict(dict)
        for *item, model, file in self._db.execute(query, (voter if prompt else "", prompt, voter)):
            if model in models:
                found[tuple(item)][model] = file
        return found

    def vote(self, token: str, choice: str) -> Vote:
        """Casts a vote; when this returns, it is on the disk. The same token again changes nothing.

        Args:
            token: of the ballot.
            choice: the numbers of the media, the best first, of which the last one may be left out; TIE or BAD.

        Returns:
            The vote that counts: the first one that was cast with this token.

        Raises:
            UserError: no such ballot was issued, or it was replaced by another; or the choice is none.
        """
        with self._lock:
            ballot = self.ballot(token)
            if ballot:
                places = places_of(choice, len(ballot.models))
                with self._db:
                    said = (time.time(), json.dumps(places), choice == BAD, token)
                    self._db.execute("INSERT INTO votes SELECT *, ?, ?, ?, NULL FROM ballots WHERE token = ?", said)
                    self._db.execute("DELETE FROM ballots WHERE token = ?", (token,))
            cast = self._read(Vote, "WHERE token = ?", token)
        if not cast:
            raise UserError("This ballot is not open any more; ask for the next one.")
        return cast[0]

    def all(self, after: int = 0) -> list[Vote]:
        """The votes with a higher number, in the order in which they were cast."""
        return self._read(Vote, "WHERE number > ? ORDER BY number", after)

    def ratings(self) -> Ratings:
        """Of all votes up to now; those that are new since the last call are added to what was known."""
        with self._lock:
            self._ratings = self._ratings or Ratings()
            for vote in self.all(self._rated):
                self._ratings.add(vote)
                self._rated = vote.number
            return self._ratings


def places_of(choice: str, ways: int) -> tuple[int, ...]:
    """[K] the place of each medium, see `Votes.vote`.

    Raises:
        UserError: the choice is none of K media.
    """
    if choice in (TIE, BAD):
        return (1,) * ways
    numbers = [str(n + 1) for n in range(ways)]
    left = [number for number in numbers if number not in choice]
    order = list(choice) + left[: len(left) == 1]
    if sorted(order) != numbers:
        raise UserError(f"{choice[:20]!r} is no vote; give the numbers 1 to {ways}, the best first, {TIE} or {BAD}.")
    return tuple(order.index(number) + 1 for number in numbers)


class Ratings:
    """Each model's skill as a normal distribution, updated vote by vote; both bad counts as a tie.

    Of openskill's models this one's intervals were the nearest to what they say, for pairs and for lists of four:
    Thurstone-Mosteller, full pairing (Weng and Lin, A Bayesian approximation method for online ranking, JMLR 12, 2011).
    """

    def __init__(self) -> None:
        from openskill.models import ThurstoneMostellerFull

        self._game: Any = ThurstoneMostellerFull(tau=0)  # tau: models do not change from vote to vote
        self._of: dict[str, Any] = defaultdict(self._game.rating)

    def __getitem__(self, model: str) -> Any:
        """`mu` and `sigma` of a model."""
        return self._of[model]

    def add(self, vote: Vote) -> None:
        """Takes a vote into account."""
        teams = [[self[model]] for model in vote.models]
        for model, (rating,) in zip(vote.models, self._game.rate(teams, ranks=list(vote.places)), strict=True):
            self._of[model] = rating

    def information(self, one: str, other: str) -> float:
        """How much a vote on two models can tell: the outcome's variance times that of their ratings."""
        ratings = self[one], self[other]
        won = self._game.predict_win([[rating] for rating in ratings])[0]
        return won * (1 - won) * sum(rating.sigma**2 for rating in ratings)


def matchups(ratings: Ratings, models: Sequence[str], ways: int, rng: random.Random) -> list[tuple[str, ...]]:
    """All sets of `ways` models, those first on which a vote tells most; chance decides among equals."""
    pairs = {pair: ratings.information(*pair) for pair in combinations(models, 2)}
    groups = list(combinations(models, ways))
    rng.shuffle(groups)
    return sorted(groups, key=lambda group: -sum(pairs[pair] for pair in combinations(group, 2)))


class Standing(NamedTuple):
    """A model among the others; 95 % intervals.

    Attributes:
        model: its name.
        rating: mean of `Ratings`, with `low` and `high`.
        strength: by Bradley and Terry on the log scale, with its own `strength_low` and `strength_high`.
        votes: it took part in.
        won: share of comparisons with another medium won, ties half.
    """

    model: str
    rating: float
    low: float
    high: float
    strength: float
    strength_low: float
    strength_high: float
    votes: int
    won: float


def standings(votes: Sequence[Vote], ratings: Ratings, *, resamples: int = 200, seed: int = 0) -> list[Standing]:
    """The models that were voted on, the best first.

    Args:
        votes: all of them.
        ratings: made of the same.
        resamples: of whole votes, for the interval of the strengths.
        seed: of the resampling.
    """
    names = sorted({model for vote in votes for model in vote.models})
    if not names:
        return []
    # what was said of whom: few kinds, however many votes
    kinds = Counter(tuple(sorted(zip(vote.models, vote.places, strict=True))) for vote in votes)
    tables = np.zeros((len(kinds), len(names), len(names)))
    for table, kind in zip(tables, kinds, strict=True):
        for (one, place), (other, behind) in combinations(kind, 2):
            i, j = names.index(one), names.index(other)
            table[i, j] = 0.5 + 0.5 * np.sign(behind - place)
            table[j, i] = 1 - table[i, j]
    counts = np.array(list(kinds.values()))
    drawn = np.random.default_rng(seed).multinomial(len(votes), counts / len(votes), size=resamples)
    # a prior of one game: who never lost has a strength, and resamples without a model too
    strengths = [bradley_terry(np.tensordot(row, tables, 1), prior=1.0) for row in (counts, *drawn)]
    low, high = np.quantile(strengths[1:], [0.025, 0.975], axis=0)
    wins = np.tensordot(counts, tables, 1)
    shares = wins.sum(1) / (wins + wins.T).sum(1)
    part = Counter(model for vote in votes for model in vote.models)
    rows = []
    for n, name in enumerate(names):
        mean, spread = ratings[name].mu, Z * ratings[name].sigma
        own = (float(values[n]) for values in (strengths[0], low, high))
        rows.append(Standing(name, mean, mean - spread, mean + spread, *own, part[name], float(shares[n])))
    return sorted(rows, key=lambda row: -row.rating)


class Voter(NamedTuple):
    """How a voter judges beside the others.

    Attributes:
        voter: hash.
        votes: they cast.
        compared: of the pairs of media that they ordered, those that most others ordered one way.
        agreed: of these, the ones that they ordered the same way.
        by_chance: probability that somebody who votes by chance agrees as often or more.
        outlier: chance explains their votes better, see `voters`.
    """

    voter: str
    votes: int
    compared: int
    agreed: int
    by_chance: float
    outlier: bool


def voters(votes: Sequence[Vote], *, odds: float = 20.0) -> list[Voter]:
    """Every voter's agreement with the others on the very same media, the most active first.

    An outlier is one whose agreements are `odds` times likelier under chance (a binomial of one half) than under the
    share of all others. So nobody is one after a few votes, nor where the others do not agree themselves.
    """
    said: dict[tuple[str, str], set[str]] = defaultdict(set)  # (better, worse) -> who said so
    for vote in votes:
        for better, worse in ordered(vote):
            said[better, worse].add(vote.voter)
    agreed, compared = Counter[str](), Counter[str]()
    for (better, worse), who in said.items():
        against = said.get((worse, better), set())
        for voter in who:
            most = len(who) - 1 - len(against - {voter})
            compared[voter] += most != 0
            agreed[voter] += most > 0
    rows = []
    for voter, cast in Counter(vote.voter for vote in votes).most_common():
        n, k = compared[voter], agreed[voter]
        others = (sum(agreed.values()) - k + 1) / (sum(compared.values()) - n + 2)  # never 0 or 1
        chance = n * math.log(0.5) - k * math.log(others) - (n - k) * math.log(1 - others)
        by_chance = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
        rows.append(Voter(voter, cast, n, k, by_chance, others > 0.5 and chance > math.log(odds)))
    return rows


def ordered(vote: Vote) -> Iterable[tuple[str, str]]:
    """Every two files of a vote of which one is better, that one first."""
    for (place, one), (behind, other) in combinations(zip(vote.places, vote.files, strict=True), 2):
        if place != behind:
            yield (one, other) if place < behind else (other, one)
