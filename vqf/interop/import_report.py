"""The report of an import."""

from collections.abc import Iterable
from pathlib import Path

from vqf.errors import printable
from vqf.interop.key_mapping import matches
from vqf.interop.key_tables import CAUSAL_MASK_KEY, IGNORED_KEYS


class ImportReport:
    """Collects what became of each tensor, and notes."""

    def __init__(self, path: Path, layout: str) -> None:
        self.path, self.layout = path, layout
        self.loaded: dict[str, str] = {}  # source name -> vqf name
        self.skipped: dict[str, str] = {}  # source name -> reason
        self.notes: list[str] = []

    def add_loaded(self, source_name: str, vqf_name: str) -> None:
        self.loaded[source_name] = vqf_name

    def add_skipped(self, source_name: str, reason: str) -> None:
        self.skipped[source_name] = reason

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finalize(self, names: Iterable[str]) -> None:
        """Add all other tensors as skipped."""
        for name in names:
            if name not in self.loaded and name not in self.skipped:
                self.add_skipped(name, skip_reason(name))

    @property
    def unknown_tensors(self) -> list[str]:
        """Those that no rule knows."""
        return [name for name, reason in self.skipped.items() if reason == UNKNOWN_TENSOR]

    def summary(self) -> list[str]:
        counts: dict[str, int] = {}
        for reason in self.skipped.values():
            counts[reason] = counts.get(reason, 0) + 1
        lines = [f"{self.path}: read as {self.layout}; {len(self.loaded)} tensors loaded, {len(self.skipped)} skipped"]
        lines += [f"  skipped: {number} ({reason})" for reason, number in counts.items()]
        return lines + [f"  {note}" for note in self.notes]

    def text(self) -> str:
        lines = [*self.summary(), "", "skipped:"]
        lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()] or ["  nothing"]
        lines += ["", "loaded:", *(f"  {name} -> {new}" for name, new in self.loaded.items())]
        return "".join(f"{printable(line)}\n" for line in lines)


UNKNOWN_TENSOR = "unknown to vqf"


def skip_reason(name: str) -> str:
    """Why a tensor is not loaded."""
    short = name.removeprefix("first_stage_model.").removeprefix("transformer.")
    if matches(CAUSAL_MASK_KEY, short):
        return "causal mask"
    return next((reason for template, reason in IGNORED_KEYS if matches(template, short)), UNKNOWN_TENSOR)
