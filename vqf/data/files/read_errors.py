"""Count unreadable images and shards in shared memory."""

import logging
from collections.abc import Callable, Sequence

import torch

from vqf.data.images.pixel_values import PixelRange, ValueLimits, dark_message
from vqf.errors import UserError, quote_name

log = logging.getLogger("vqf")

MAX_LISTED = 100  # names in one log line


class ReadErrorCounter:
    """One flag per image, or per shard, of a split: whether reading it has failed.

    Args:
        items: The field's plural, for messages: "train images".
        max_unreadable: Fraction of `total` above which the run stops.
        failure: The verb of messages.
        slots: Number of flags, by default `total`.
        name_of: Name of an item by its flag, to log all before the run stops.
        all_may_fail: Whether `max_unreadable=1` tolerates no readable item.
    """

    def __init__(
        self,
        items: str,
        total: int,
        max_unreadable: float,
        *,
        failure: str = "cannot be read",
        slots: int | None = None,
        name_of: Callable[[int], str] | None = None,
        all_may_fail: bool = False,
    ) -> None:
        self.items, self.total, self.max_unreadable, self.failure = items, total, max_unreadable, failure
        self.limit = allowed_unreadable(max_unreadable, total)
        self.name_of, self.all_may_fail = name_of, all_may_fail
        # Shared memory: worker processes flag what they meet, and the main process sees it.
        self.flags = torch.zeros(total if slots is None else slots, dtype=torch.bool).share_memory_()

    def add(self, slot: int, name: str, reason: str) -> bool:
        """Flag an item; return False if it was flagged before.

        Raises:
            UserError: If too many are flagged.
        """
        if self.flags[slot]:
            return False
        self.flags[slot] = True
        self.check(f"; the last is {quote_name(name)} ({reason})")
        return True

    def check(self, detail: str = "") -> None:
        """Check the number of flagged items.

        Raises:
            UserError: If it is above `limit`, or if all are flagged and must not be.
        """
        count = int(self.flags.sum())
        if count <= self.limit and (self.all_may_fail or count < self.total):
            return
        if self.name_of is not None:
            names = [self.name_of(slot) for slot in self.flags.nonzero().flatten().tolist()]
            log.warning(f"data.root: cannot read {summarize_names(names)}")
        raise UserError(
            f"data.max_unreadable={self.max_unreadable:g}: {count} of the {self.total} {self.items} "
            f"{self.failure}{detail}"
        )


class DarkNote:
    """Mentions the first image of a split that becomes dark for want of `data.range`, once over all workers."""

    def __init__(self) -> None:
        self.flag = torch.zeros(1, dtype=torch.bool).share_memory_()

    def check(self, name: str, limits: ValueLimits | None, pixel_range: PixelRange | None) -> None:
        message = None if limits is None or self.flag else dark_message(quote_name(name), limits, pixel_range)
        if message:
            self.flag.fill_(True)
            log.warning(message)


def summarize_names(names: Sequence[str]) -> str:
    """Quote and join at most `MAX_LISTED` names."""
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(quote_name, names[:MAX_LISTED])) + more


def allowed_unreadable(fraction: float, count: int) -> int:
    """Return `fraction` of `count`, at least 1 unless `fraction` is 0."""
    return max(int(fraction * count), 1) if fraction > 0 else 0
