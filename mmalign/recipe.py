"""Recipes: one runnable Python file each, with a function `recipe() -> Run`; every field of Run is a flag over it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import runpy
import shutil
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign import bundled
from mmalign.records import UserError


def listed() -> dict[str, str]:
    """Name -> first line of the docstring, of every bundled recipe."""
    files = sorted(bundled("recipes").glob("*.py"))
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}


def copy_recipe(name: str) -> Path:
    """Copies a bundled recipe into the current folder."""
    target = Path.cwd() / f"{name}.py"
    if target.exists():
        raise UserError(f"{target}: exists already; rename it, or copy into another folder.")
    return Path(shutil.copy(_file(name), target))


def _file(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file; mmalign recipes lists the bundled ones.")
        return path
    names = list(listed())
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise UserError(f"{name}: no bundled recipe of that name; {hint}")
    return bundled("recipes") / f"{name}.py"


def load_recipe(name: str) -> Any:
    """The Run, or the ScorerRun, of a bundled recipe's name or a `.py` file.

    Raises:
        UserError: no such recipe, or the file does not parse, does not run or has no `recipe()`.
    """
    file = _file(name)
    try:
        made = runpy.run_path(str(file))["recipe"]()
    except SyntaxError as error:
        raise UserError(f"{file}: line {error.lineno} does not parse ({error.msg}).") from error
    except KeyError as error:
        raise UserError(f"{file}: has no function {error}; a recipe needs `def recipe() -> Run`.") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # whatever somebody's Python file may raise
        raise UserError(f"{file}: does not run ({type(error).__name__}: {error}).") from error
    from mmalign.scoring.fit import ScorerRun
    from mmalign.training.run import Run

    if not isinstance(made, Run | ScorerRun):
        kind = type(made).__name__
        raise UserError(f"{file}: recipe() returned {kind}; it has to return a Run (or a ScorerRun).")
    return made


def with_flags(run: Any, argv: Sequence[str], *, prog: str) -> Any:
    """The run with flags over it; `--objective NAME` switches the method.

    Another method's hyperparameters are never carried over: what the new one has no default for must be given.

    Raises:
        UserError: an unknown flag or objective, a value that cannot be, or a scorer's recipe.
    """
    import tyro

    from mmalign.cli import parsed
    from mmalign.surrogate import AnswerTokens

    if not hasattr(run, "objective"):
        raise UserError(f"{prog}: this recipe trains a scorer; run it with mmalign train-scorer.")

    argv, kind = _objective(run, list(argv))
    own = kind is type(run.objective)
    flags = _flags_of(kind, run.objective if own else None)
    # tyro reads types: the field has to be of the concrete method, not of any
    typed = dataclasses.make_dataclass("Run", [("objective", flags)], bases=(type(run),), frozen=True, kw_only=True)
    typed.__doc__ = type(run).__doc__
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    try:
        required = [field.name for field in dataclasses.fields(flags) if field.default is dataclasses.MISSING]
        if missing := [name for name in required if not any(_is_flag(word, f"objective.{name}") for word in argv)]:
            flag = f"--objective.{missing[0]}".replace("_", "-")
            raise UserError(f"{prog}: {kind.__name__} needs {flag}; another method's value is not carried over.")
        default = typed(**{**values, "objective": flags(**dict.fromkeys(required, tyro.MISSING))})
        flagged = parsed(typed, argv, prog=prog, default=default)
        given = {field.name: getattr(flagged.objective, field.name) for field in dataclasses.fields(flags)}
        # Else the method's own draw; a token model has one draw for all methods
        draw = {"draw": run.objective.draw} if own or isinstance(run.objective.draw, AnswerTokens) else {}
        objective = kind(**given, **draw)
    except ValueError as error:
        raise UserError(f"{prog}: {error}.") from error
    values = {field.name: getattr(flagged, field.name) for field in dataclasses.fields(run)}
    return type(run)(**{**values, "objective": objective})


def _is_flag(word: str, name: str) -> bool:
    return word.partition("=")[0].replace("_", "-") == f"--{name}".replace("_", "-") or word in ("-h", "--help")


def _flags_of(kind: type, own: Any | None) -> type:
    """A method's hyperparameters as a dataclass that tyro can read: without its draw, which is no flag.

    Their defaults are those of `own`, or else the method's.
    """
    hints = typing.get_type_hints(kind)
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        if field.name != "draw":
            value = field.default if own is None else getattr(own, field.name)
            default = () if value is dataclasses.MISSING else (dataclasses.field(default=value),)
            fields.append((field.name, hints[field.name], *default))
    return dataclasses.make_dataclass(kind.__name__, fields, frozen=True, kw_only=True)


def _objective(run: Any, argv: list[str]) -> tuple[list[str], type]:
    """Takes `--objective NAME` out of the arguments."""
    from mmalign import objectives

    for place, word in enumerate(argv):
        if word == "--objective" or word.startswith("--objective="):
            name = word.partition("=")[2] or (argv[place + 1] if place + 1 < len(argv) else "")
            if name not in objectives.__all__:
                raise UserError(f"--objective {name}: no such method; there are {', '.join(objectives.__all__)}.")
            rest = argv[:place] + argv[place + (1 if "=" in word else 2) :]
            return rest, getattr(objectives, name)
    return argv, type(run.objective)
