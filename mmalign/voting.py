"""What `mmalign votes` does, and the demo's button: votes as comparisons that train at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmalign.records import Comparison, Text, UserError


def votes(argv: Sequence[str]) -> None:
    """Exports votes."""
    import tyro

    from mmalign.cli import parsed

    if not argv or argv[0] != "export":
        raise UserError("mmalign votes export DATA_DIR writes the demo's votes as preference data.")
    print(parsed(export, argv[1:], prog="mmalign votes export", config=(tyro.conf.PositionalRequiredArgs,)))


def export(
    data_dir: str,
    output: str = "votes",
    outliers: Literal["keep", "drop"] = "keep",
    layout: Literal["parquet", "jsonl"] = "parquet",
) -> str:
    """Writes the demo's votes as preference data: pairs, and ranked lists of four.

    A comparison's user is the hash of who voted. Ties and what was called bad altogether are left out.

    Args:
        data_dir: the demo's, with votes.sqlite.
        output: folder for the comparisons.
        outliers: drop leaves out those whose votes chance explains better, see the Arena's table of voters.
        layout: parquet, or jsonl with the media beside it.

    Returns:
        What was written, and how much was left out and why.

    Raises:
        UserError: there are no votes there, or none that can be written.
    """
    from mmalign.data.export import write_comparisons
    from mmalign.evaluation.votes import VOTES_FILE, Votes, voters

    if not (Path(data_dir) / VOTES_FILE).is_file():
        raise UserError(f"{data_dir}: holds no {VOTES_FILE}; give the --data-dir of the demo.")
    store = Votes(data_dir)
    cast = store.all()
    dropped = {row.voter for row in voters(cast) if row.outlier and outliers == "drop"}
    counts = {"both bad": 0, "ties": 0, "of outliers": 0, "with a medium that is missing or damaged": 0}
    kept, lost = [], []
    for vote in cast:
        gone = [name for name in (*vote.files, *vote.settings.get("images", ())) if not store.whole(name)]
        reasons = (vote.bad, len(set(vote.places)) == 1, vote.voter in dropped, bool(gone))
        reason = next((reason for reason, holds in zip(counts, reasons, strict=True) if holds), None)
        if reason:
            counts[reason] += 1
            lost += gone
        else:
            kept.append(vote)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    if not kept:
        raise UserError(f"{data_dir}: no vote that can be exported{f' ({left_out})' if left_out else ''}; vote first.")
    write_comparisons(output, (_comparison(vote, store.media) for vote in kept), layout=layout)
    lines = [f"{len(kept)} of {len(cast)} votes are in {output} now; left out: {left_out or 'none'}."]
    return "\n".join(lines + [f"missing or damaged: {store.media / name}" for name in dict.fromkeys(lost)])


def _comparison(vote: Any, media: Path) -> Comparison:
    from mmalign.data.fields import file_of
    from mmalign.data.label import win_shares

    def medium(name: str) -> Any:
        path = media / name
        return Text(path.read_text(encoding="utf-8")) if path.suffix == ".txt" else file_of(path, None)

    return Comparison(
        id=f"vote-{vote.token}",
        prompt=vote.prompt,
        media=tuple(map(medium, vote.files)),
        score=win_shares([[-place for place in vote.places]]),
        user=vote.voter,
        condition=tuple(map(medium, vote.settings.get("images", ()))) or None,
        source=vote.models,
    )
