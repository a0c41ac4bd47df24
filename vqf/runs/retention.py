"""Which checkpoints of a run are kept: the newest, and the best."""

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
    """The held-out number by which a checkpoint is the best one."""

    metric: str
    higher_is_better: bool  # whether more of it is better

    def score(self, state: Mapping[str, Any]) -> float:
        """Return what `state.json` says of it, so that more is better; -inf where it was not measured at that step."""
        look = state.get("last_validation") or {}
        value = look.get("values", {}).get(self.metric, math.nan)
        if look.get("step") != state["step"] or math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value


def parse_best_criterion(metric: str | None, known: Mapping[str, bool]) -> BestCriterion | None:
    """Read checkpoint.best, given which held-out numbers there are and whether more of each is better.

    Raises:
        UserError: If there is no such number.
    """
    if metric is None:
        return None
    if metric not in known:
        raise UserError(f"checkpoint.best: {unknown_message('held-out number', metric, known)}")
    return BestCriterion(metric, known[metric])


def prune_checkpoints(
    folders: Sequence[Path], keep: int, best: BestCriterion | None, keep_also: Path | None = None
) -> None:
    """Delete all of a run's checkpoints, oldest first, but the newest `keep`, the best and another; with 0, none."""
    kept = {*folders[-keep:], best and _best_folder(folders, best), keep_also}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _best_folder(folders: Sequence[Path], best: BestCriterion) -> Path | None:
    """Return the first of those that score best; None where nothing was measured."""
    found, top = None, -math.inf
    for folder in folders:
        try:
            score = best.score(json.loads((folder / "state.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # broken
            continue
        if score > top:
            found, top = folder, score
    return found
