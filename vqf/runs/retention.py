"""Which checkpoints of a run are kept."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqf.errors import UserError, unknown_message


@dataclass(frozen=True)
class BestCriterion:
    """The validation metric that decides which checkpoint is best."""

    metric: str
    higher_is_better: bool

    def score(self, state: Mapping[str, Any]) -> float:
        """Value of the metric in a state.json, negated if lower is better; -inf if not measured."""
        validation = state.get("last_validation") or {}
        value = validation.get("values", {}).get(self.metric, math.nan)
        if validation.get("step") != state["step"] or math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value


def parse_best_criterion(metric: str | None, known: Mapping[str, bool]) -> BestCriterion | None:
    """Read `checkpoint.best`.

    Args:
        known: Whether higher is better, by metric.

    Raises:
        UserError: If the metric is unknown.
    """
    if metric is None:
        return None
    if metric not in known:
        raise UserError(f"checkpoint.best: {unknown_message('validation metric', metric, known)}")
    return BestCriterion(metric, known[metric])


def prune_checkpoints(
    folders: Sequence[Path], keep: int, best: BestCriterion | None, keep_also: Path | None = None
) -> None:
    """Delete checkpoints, oldest first, except the newest `keep` (0: all), the best one and `keep_also`."""
    kept = {*folders[-keep:], best and _best_folder(folders, best), keep_also}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _best_folder(folders: Sequence[Path], best: BestCriterion) -> Path | None:
    best_folder, top = None, -math.inf
    for folder in folders:
        try:
            score = best.score(json.loads((folder / "state.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a broken checkpoint
            continue
        if score > top:
            best_folder, top = folder, score
    return best_folder
