"""Which member of a sample in a shard is what, by their endings: all that follows the first dot of their names."""

from collections.abc import Iterable
from dataclasses import dataclass

from vqf.data.images.decode import EXTENSIONS


@dataclass(frozen=True)
class SampleMembers:
    """The endings that members have.

    Args:
        image: Of the image; by default it is the first member that is one.
        label_key: The field of `.json` that is the label; by default it is what `.cls` holds.
        condition: Of the map, if there are maps: `depth` is `depth.png`, `depth.tif` or `depth` itself.
    """

    image: str | None = None
    label_key: str | None = None
    condition: str | None = None

    @property
    def label_extension(self) -> str:
        """The ending of the member that holds the label."""
        return "json" if self.label_key else "cls"

    def find_image(self, endings: Iterable[str]) -> str | None:
        """Return which member is the image."""
        for ending in endings:
            if ending == self.image if self.image else _is_image(ending) and not self.is_map(ending):
                return ending
        return None

    def find_map(self, endings: Iterable[str]) -> str | None:
        """Return which member is the map; None where there are to be none."""
        return next(filter(self.is_map, endings), None) if self.condition else None

    def is_map(self, ending: str) -> bool:
        """Say whether a member is a map, by its ending."""
        wanted = self.condition
        return wanted is not None and (ending == wanted or (ending.startswith(f"{wanted}.") and _is_image(ending)))


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in EXTENSIONS
