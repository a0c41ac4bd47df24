"""Several data sources as one."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from vqf.errors import UserError
from vqf.protocols import Data, Sample, Size, Split, Streamed
from vqf.randomness import mix
from vqf.registry import build, check, register

OPTION = r"(?<![\w/.'])data\."  # where an error names an option of a source, and no file


@register("data", "union")
class Union:
    """Data sources side by side; the label of a picture is the source that it is from.

    What a source holds out stays held out. An epoch is every picture of every source.

    Args:
        parts: The sources by name, each a node of `data` as in `{name: folder, root: faces}`.
    """

    def __init__(self, image_size: int | Size, seed: int, *, parts: Mapping[str, Any]) -> None:
        if not parts:
            raise ValueError("parts is empty; name sources, as in data.parts.faces={name:folder,root:faces}")
        self.classes = list(parts)
        for name, node in parts.items():
            check("data", node, f"data.parts.{name}")
        self.sources = {name: _open(name, node, image_size, mix(seed, name)) for name, node in parts.items()}

    def split(self, name: str) -> "UnionSplit":
        """Return "train" or "validation"."""
        return UnionSplit({source: data.split(name) for source, data in self.sources.items()})


class UnionSplit:
    """The training parts of all sources, or the validation parts, one after the other."""

    def __init__(self, parts: Mapping[str, Split]) -> None:
        if stream := next((name for name, part in parts.items() if isinstance(part, Streamed)), None):
            raise UserError(
                f"data.parts.{stream}: a stream cannot be one of several sources; copy its shards to a folder"
            )
        self.parts = list(parts.values())
        self.ends = list(accumulate(len(part) for part in self.parts))
        facts = [(name, len(part), part.fingerprint) for name, part in parts.items()]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, epoch: int, index: int) -> Sample:
        """Return a picture as it looks in an epoch, labelled with the number of its source."""
        source = bisect_right(self.ends, index)
        before = self.ends[source - 1] if source else 0
        return replace(self.parts[source].item(epoch, index - before), label=source)


def _open(name: str, node: Mapping[str, Any], image_size: int | Size, seed: int) -> Data:
    try:
        source: Data = build("data", node, image_size=image_size, seed=seed)
    except UserError as error:
        raise UserError(re.sub(OPTION, f"data.parts.{name}.", str(error))) from error
    return source
