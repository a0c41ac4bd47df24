"""Payloads that create a file if they run."""

import os
import pickle
from pathlib import Path
from typing import Any


class Runs:
    """An object whose pickle calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Canary:
    """A file that must never exist."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "canary"

    @property
    def command(self) -> str:
        """A shell command that creates it."""
        return f"touch {self.path}"

    def payloads(self) -> dict[str, Runs]:
        """Objects whose pickles create it, each in another way."""
        write = f"open({str(self.path)!r}, 'w')"
        return {
            "system": Runs(os.system, self.command),
            "eval": Runs(eval, write),
            "exec": Runs(exec, write),
            "open": Runs(open, str(self.path), "w"),
            "pickle in a pickle": Runs(pickle.loads, pickle.dumps(Runs(os.system, self.command))),
        }

    def check(self) -> None:
        """Fail if something ran."""
        assert not self.path.exists(), "a payload ran"


PAYLOADS = ["system", "eval", "exec", "open", "pickle in a pickle"]
