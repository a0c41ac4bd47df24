"""Numbers that are not finite: seen at every step, answered as guard.nonfinite says."""

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
SUMS = ("loss", "gradient")
CURE = "Lower optimizer.lr, set clip=1, or warm up with schedule.warmup=0.05"


@dataclass(frozen=True)
class Trouble:
    """What was not finite, and at which step it was first."""

    step: int
    words: str  # "'l1' is nan; so are loss, gradient"


class Lookout:
    """Remembers where numbers were not finite first. It stays on their device: reading them would wait for it."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}  # by the keys: first steps, and what was there

    def see(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in the scalars of a step."""
        keys = tuple(values)
        now = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        steps, found = self.seen.get(keys) or (torch.full(now.shape, NEVER, device=now.device), torch.zeros_like(now))
        new = ~now.isfinite() & (steps == NEVER)
        self.seen[keys] = torch.where(new, step, steps), torch.where(new, now, found)

    def read(self) -> Trouble | None:
        """Wait for the device, and return what was first. Every process must ask; they agree on the step."""
        rows = [
            (step, key, value)
            for keys, (steps, found) in self.seen.items()
            for key, step, value in zip(keys, steps.tolist(), found.tolist(), strict=True)
        ]
        first = min((step for step, _, _ in rows), default=NEVER)
        first = int(comm.least(torch.tensor(first)))
        if first == NEVER:
            return None
        names = {key: value for step, key, value in rows if step == first}
        return Trouble(first, _words(names))


class Guard:
    """Watches a run for numbers that are not finite.

    stop: the run ends. skip: players stay where they were (`Player`), and the run ends after `limit` such steps in a
    row. rollback: the run goes back to its newest checkpoint and on with other pictures, and ends when it had to
    `limit` times without a new checkpoint in between.
    """

    def __init__(self, kind: str, config: DictConfig) -> None:
        self.kind, self.policy, self.limit = kind, config.nonfinite, config.limit
        self.lookout = Lookout()
        self.skipped = 0  # steps in a row
        self.rollbacks = 0  # since the newest checkpoint

    def see(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in the scalars of a step."""
        self.lookout.see(step, values)

    def read(self, moved: bool) -> Trouble | None:
        """Answer what was seen since the last time: returns what asks for a rollback, if anything does.

        Args:
            moved: Whether every player moved in the last step.

        Raises:
            UserError: If the run is to stop.
        """
        trouble, self.lookout = self.lookout.read(), Lookout()
        if moved and self.policy == "skip":
            self.skipped = 0
        if trouble is None:
            return None
        where = f"{self.kind}, step {trouble.step + 1}: {trouble.words}"
        if self.policy == "stop" or (self.policy == "skip" and moved):
            raise UserError(f"{where}; the newest checkpoint is kept. {CURE}, and go on with resume=true")
        if self.policy == "skip":
            self.skipped += 1
            self._count(self.skipped, where, "step skipped", "in a row")
            return None
        self.rollbacks += 1
        self._count(self.rollbacks, where, "going back", "without a new checkpoint")
        return trouble

    def saved(self) -> None:
        """Say that a new checkpoint is there."""
        self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"skipped": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.skipped = state.get("skipped", 0)

    def _count(self, count: int, where: str, action: str, manner: str) -> None:
        if count > self.limit:
            raise UserError(f"{where}, {count} times {manner}, and guard.limit={self.limit}. {CURE}")
        if comm.first():
            log.warning("%s; %s, %d of at most %d %s", where, action, count, self.limit, manner)


def _words(names: Mapping[str, float]) -> str:
    """Name the numbers, the first of them with its value; in other processes there may be none."""
    if not names:
        return "a number of another process is not finite"
    (name, value), *others = sorted(names.items(), key=lambda each: each[0].endswith(SUMS))  # terms first
    more = f" ({', '.join(key for key, _ in others)} too)" if others else ""
    return f"'{name}' is {value}{more}"
