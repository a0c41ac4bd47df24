"""Numbers that are not finite: seen at every step, answered as nonfinite.action says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf.distributed import comm
from vqf.errors import UserError
from vqf.terminal import log

NEVER = 2**62  # later than any step
TOTAL_KEYS = ("loss", "grad_norm", "grad_norm/discriminator")
HINT = "Lower optimizer.lr, set clip=1, or warm up with schedule.warmup=0.05"


@dataclass(frozen=True)
class NonFiniteEvent:
    """What was not finite, and at which step it was first."""

    step: int
    message: str  # "'l1' is nan; so are loss, gradient"


class NonFiniteDetector:
    """Remembers where numbers were not finite first. It stays on their device: reading them would wait for it."""

    def __init__(self) -> None:
        self.first_seen: dict[
            tuple[str, ...], tuple[Tensor, Tensor]
        ] = {}  # by the keys: first steps, and what was there

    def update(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in the scalars of a step."""
        keys = tuple(values)
        now = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        steps, found = self.first_seen.get(keys) or (
            torch.full(now.shape, NEVER, device=now.device),
            torch.zeros_like(now),
        )
        new = ~now.isfinite() & (steps == NEVER)
        self.first_seen[keys] = torch.where(new, step, steps), torch.where(new, now, found)

    def poll(self) -> NonFiniteEvent | None:
        """Wait for the device, and return what was first. Every process must ask; they agree on the step."""
        rows = [
            (step, key, value)
            for keys, (steps, found) in self.first_seen.items()
            for key, step, value in zip(keys, steps.tolist(), found.tolist(), strict=True)
        ]
        first = min((step for step, _, _ in rows), default=NEVER)
        first = int(comm.all_reduce_min(torch.tensor(first)))
        if first == NEVER:
            return None
        names = {key: value for step, key, value in rows if step == first}
        return NonFiniteEvent(first, _describe(names))


class NonFiniteGuard:
    """Watches a run for numbers that are not finite.

    stop: the run ends. skip: weights, optimizer state and buffers are left unchanged (`OptimizerStep`), and the run
    ends after `limit` such steps in a row. rollback: the run goes back to its newest checkpoint and on with other
    images, and ends when it had to `limit` times without a new checkpoint in between.
    """

    def __init__(self, kind: str, config: DictConfig) -> None:
        self.kind, self.action, self.limit = kind, config.action, config.limit
        self.detector = NonFiniteDetector()
        self.consecutive_skips = 0  # steps in a row
        self.rollbacks = 0  # since the newest checkpoint

    def update(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in the scalars of a step."""
        self.detector.update(step, values)

    def poll(self, stepped: bool) -> NonFiniteEvent | None:
        """Answer what was seen since the last time: returns what asks for a rollback, if anything does.

        Args:
            stepped: Whether every player moved in the last step.

        Raises:
            UserError: If the run is to stop.
        """
        trouble, self.detector = self.detector.poll(), NonFiniteDetector()
        if stepped and self.action == "skip":
            self.consecutive_skips = 0
        if trouble is None:
            return None
        where = f"{self.kind}, step {trouble.step + 1}: {trouble.message}"
        if self.action == "stop" or (self.action == "skip" and stepped):
            raise UserError(f"{where}; the newest checkpoint is kept. {HINT}, and go on with resume=true")
        if self.action == "skip":
            self.consecutive_skips += 1
            self._check_limit(self.consecutive_skips, where, "step skipped", "in a row")
            return None
        self.rollbacks += 1
        self._check_limit(self.rollbacks, where, "going back", "without a new checkpoint")
        return trouble

    def checkpoint_saved(self) -> None:
        """Say that a new checkpoint is there."""
        self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.consecutive_skips = state.get("consecutive_skips", 0)

    def _check_limit(self, count: int, where: str, action: str, manner: str) -> None:
        if count > self.limit:
            raise UserError(f"{where}, {count} times {manner}, and nonfinite.limit={self.limit}. {HINT}")
        if comm.is_main():
            log.warning("%s; %s, %d of at most %d %s", where, action, count, self.limit, manner)


def _describe(names: Mapping[str, float]) -> str:
    """Name the numbers, the first of them with its value; in other processes there may be none."""
    if not names:
        return "a number of another process is not finite"
    (name, value), *others = sorted(names.items(), key=lambda each: each[0] in TOTAL_KEYS)  # terms first
    more = f" ({', '.join(key for key, _ in others)} too)" if others else ""
    return f"'{name}' is {value}{more}"
