"""Detection of NaN and infinity in training scalars, and in what is saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vqf.distributed import comm
from vqf.errors import UserError, name_first
from vqf.terminal import log

NEVER = 2**62  # later than any step
TOTAL_KEYS = ("loss", "grad_norm", "grad_norm/discriminator")  # follow from other scalars, so named last
HINT = "Lower optimizer.lr, set clip=1, or warm up with schedule.warmup=0.05"


@dataclass(frozen=True)
class NonFiniteEvent:
    """The first step with non-finite scalars, and which."""

    step: int
    message: str  # "'l1' is nan (loss, grad_norm too)"


class NonFiniteDetector:
    """Records the first step at which each scalar was not finite, on the device."""

    def __init__(self) -> None:
        # By log keys, which change when the discriminator starts: first steps (n,) int64, and the values there (n,).
        self.first_seen: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def update(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        """Record the scalars of a step, without a host wait."""
        keys = tuple(scalars)
        current = torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
        steps, values = self.first_seen.get(keys) or (
            torch.full(current.shape, NEVER, device=current.device),
            torch.zeros_like(current),
        )
        is_first = ~current.isfinite() & (steps == NEVER)
        self.first_seen[keys] = torch.where(is_first, step, steps), torch.where(is_first, current, values)

    def poll(self) -> NonFiniteEvent | None:
        """Return the first event over all ranks. It waits for the device; every rank must call it."""
        rows = [
            (step, key, value)
            for keys, (steps, values) in self.first_seen.items()
            for key, step, value in zip(keys, steps.tolist(), values.tolist(), strict=True)
        ]
        own_first = min((step for step, _, _ in rows), default=NEVER)
        first = int(comm.all_reduce_min(torch.tensor(own_first)))
        if first == NEVER:
            return None
        return NonFiniteEvent(first, _describe({key: value for step, key, value in rows if step == first}))


class NonFiniteGuard:
    """Acts on non-finite scalars as nonfinite.action says.

    * stop: the run ends.
    * skip: the step changes nothing; the run ends after more than `limit` in a row.
    * rollback: the trainer restores the newest checkpoint and continues with other batches; the run ends after more
      than `limit` without a new checkpoint.

    Args:
        kind: "stage1" or "stage2".
    """

    def __init__(self, kind: str, config: DictConfig) -> None:
        self.kind, self.action, self.limit = kind, config.action, config.limit
        self.detector = NonFiniteDetector()
        self.consecutive_skips = 0
        self.rollbacks = 0  # since the newest checkpoint

    def update(self, step: int, scalars: Mapping[str, Tensor]) -> None:
        self.detector.update(step, scalars)

    def poll(self, stepped: bool) -> NonFiniteEvent | None:
        """Act on what was recorded since the last call; returns an event that asks for a rollback.

        Args:
            stepped: Whether all optimizers have taken the last step.

        Raises:
            UserError: If the run must stop.
        """
        event, self.detector = self.detector.poll(), NonFiniteDetector()
        if stepped and self.action == "skip":
            self.consecutive_skips = 0
        if event is None:
            return None
        problem = f"{self.kind}, step {event.step + 1}: {event.message}"
        # With action=skip a step that was taken anyway had finite losses: something else that is logged is not finite.
        if self.action == "stop" or (self.action == "skip" and stepped):
            raise UserError(f"{problem}; the newest checkpoint is kept. {HINT}, and continue with resume=true")
        if self.action == "skip":
            self.consecutive_skips += 1
            self._check_limit(self.consecutive_skips, problem, "step skipped", "in a row")
            return None
        self.rollbacks += 1
        self._check_limit(self.rollbacks, problem, "rolling back", "without a new checkpoint")
        return event

    def check_state(self, step: int, names: Sequence[str]) -> NonFiniteEvent | None:
        """Act on weights that are not finite after `step` steps, before they are saved: the last step may be the cause.

        Args:
            names: Their names on this rank; every rank must call it.

        Returns:
            An event that asks for a rollback, or None.

        Raises:
            UserError: If the run must stop. Skipping is no cure: the weights are spoiled.
        """
        if not comm.any_rank(bool(names)):
            return None
        what = name_first(names) if names else "a tensor of another process"
        event = NonFiniteEvent(step - 1, f"not all values of {what} are finite after the step")
        problem = f"{self.kind}, step {step}: {event.message}"
        if self.action != "rollback":
            raise UserError(f"{problem}; nothing of it is saved. {HINT}, and continue with resume=true")
        self.rollbacks += 1
        self._check_limit(self.rollbacks, problem, "rolling back", "without a new checkpoint")
        return event

    def checkpoint_saved(self) -> None:
        self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state; an empty one resets."""
        self.consecutive_skips = int(state.get("consecutive_skips", 0))

    def _check_limit(self, count: int, problem: str, action: str, manner: str) -> None:
        if count > self.limit:
            raise UserError(f"{problem}, {count} times {manner}, and nonfinite.limit={self.limit}. {HINT}")
        if comm.is_main():
            log.warning("%s; %s, %d of at most %d %s", problem, action, count, self.limit, manner)


def _describe(values: Mapping[str, float]) -> str:
    if not values:
        return "a scalar of another process is not finite"
    (name, value), *others = sorted(values.items(), key=lambda item: item[0] in TOTAL_KEYS)  # single losses first
    also = f" ({', '.join(key for key, _ in others)} too)" if others else ""
    return f"'{name}' is {value}{also}"
