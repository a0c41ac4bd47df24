"""What became of every tensor of a file."""

from collections.abc import Iterable
from pathlib import Path

from vqf.interop.key_mapping import matches
from vqf.interop.key_tables import CAUSAL_MASK_KEY, IGNORED_KEYS


class ImportReport:
    """Collects, tensor by tensor, what was taken under which name and what was left, and why.

    Args:
        path: The file.
        layout: Of whose names it was read.
    """

    def __init__(self, path: Path, layout: str) -> None:
        self.path, self.layout = path, layout
        self.taken: dict[str, str] = {}  # their name -> vqf's
        self.skipped: dict[str, str] = {}  # their name -> why
        self.notes: list[str] = []

    def add_taken(self, theirs: str, ours: str) -> None:
        """Note a tensor that is used."""
        self.taken[theirs] = ours

    def add_skipped(self, theirs: str, why: str) -> None:
        """Note a tensor that is not used."""
        self.skipped[theirs] = why

    def note(self, text: str) -> None:
        """Note what is not about a tensor: a guess, a default, a state that starts afresh."""
        self.notes.append(text)

    def finalize(self, names: Iterable[str]) -> None:
        """Account for every tensor that nobody noted."""
        for name in names:
            if name not in self.taken and name not in self.skipped:
                self.add_skipped(name, skip_reason(name))

    @property
    def unknown_tensors(self) -> list[str]:
        """Names of tensors that were left without anyone knowing what they are."""
        return [name for name, why in self.skipped.items() if why == UNKNOWN_TENSOR]

    def summary(self) -> list[str]:
        """Return a few lines for the log."""
        counts: dict[str, int] = {}
        for why in self.skipped.values():
            counts[why] = counts.get(why, 0) + 1
        lines = [f"{self.path}: read as {self.layout}; {len(self.taken)} tensors taken, {len(self.skipped)} left"]
        lines += [f"  left: {number} ({why})" for why, number in counts.items()]
        return lines + [f"  {note}" for note in self.notes]

    def text(self) -> str:
        """Return all of it, a line for every tensor."""
        lines = [*self.summary(), "", "left:"]
        lines += [f"  {name}: {why}" for name, why in self.skipped.items()] or ["  nothing"]
        return "\n".join([*lines, "", "taken:", *(f"  {name} -> {new}" for name, new in self.taken.items()), ""])


UNKNOWN_TENSOR = "unknown to vqf"


def skip_reason(name: str) -> str:
    """Say what a tensor is that is not taken."""
    short = name.removeprefix("first_stage_model.").removeprefix("transformer.")
    if matches(CAUSAL_MASK_KEY, short):
        return "causal mask"
    return next((why for template, why in IGNORED_KEYS if matches(template, short)), UNKNOWN_TENSOR)
