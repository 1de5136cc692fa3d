"""Scorers: one number for how well a medium answers a prompt. Code lives in families, facts in cards."""

from mmalign.scoring.scorer import Card, Scorer, list_scorers, load_scorer

__all__ = ["Card", "Scorer", "list_scorers", "load_scorer"]
