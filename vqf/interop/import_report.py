"""What became of every tensor of a file."""

from collections.abc import Iterable
from pathlib import Path

from vqf.interop.key_mapping import fits
from vqf.interop.key_tables import KNOWN, MASK


class Report:
    """Collects, tensor by tensor, what was taken under which name and what was left, and why.

    Args:
        path: The file.
        layout: Of whose names it was read.
    """

    def __init__(self, path: Path, layout: str) -> None:
        self.path, self.layout = path, layout
        self.taken: dict[str, str] = {}  # their name -> vqf's
        self.left: dict[str, str] = {}  # their name -> why
        self.notes: list[str] = []

    def take(self, theirs: str, ours: str) -> None:
        """Note a tensor that is used."""
        self.taken[theirs] = ours

    def leave(self, theirs: str, why: str) -> None:
        """Note a tensor that is not used."""
        self.left[theirs] = why

    def note(self, text: str) -> None:
        """Note what is not about a tensor: a guess, a default, a state that starts afresh."""
        self.notes.append(text)

    def close(self, names: Iterable[str]) -> None:
        """Account for every tensor that nobody noted."""
        for name in names:
            if name not in self.taken and name not in self.left:
                self.leave(name, reason(name))

    @property
    def strange(self) -> list[str]:
        """Names of tensors that were left without anyone knowing what they are."""
        return [name for name, why in self.left.items() if why == UNKNOWN]

    def summary(self) -> list[str]:
        """Return a few lines for the log."""
        counts: dict[str, int] = {}
        for why in self.left.values():
            counts[why] = counts.get(why, 0) + 1
        lines = [f"{self.path}: read as {self.layout}; {len(self.taken)} tensors taken, {len(self.left)} left"]
        lines += [f"  left: {number} ({why})" for why, number in counts.items()]
        return lines + [f"  {note}" for note in self.notes]

    def text(self) -> str:
        """Return all of it, a line for every tensor."""
        lines = [*self.summary(), "", "left:"]
        lines += [f"  {name}: {why}" for name, why in self.left.items()] or ["  nothing"]
        return "\n".join([*lines, "", "taken:", *(f"  {name} -> {new}" for name, new in self.taken.items()), ""])


UNKNOWN = "unknown to vqf"


def reason(name: str) -> str:
    """Say what a tensor is that is not taken."""
    short = name.removeprefix("first_stage_model.").removeprefix("transformer.")
    if fits(MASK, short):
        return "causal mask"
    return next((why for template, why in KNOWN if fits(template, short)), UNKNOWN)
