"""Which member of a sample in a shard is what, by their endings: all that follows the first dot of their names."""

from collections.abc import Iterable
from dataclasses import dataclass

from vqf.data.imaging import EXTENSIONS


@dataclass(frozen=True)
class Roles:
    """The endings that members have.

    Args:
        image: Of the picture; by default it is the first member that is one.
        label_key: The field of `.json` that is the label; by default it is what `.cls` holds.
        condition: Of the map, if there are maps: `depth` is `depth.png`, `depth.tif` or `depth` itself.
    """

    image: str | None = None
    label_key: str | None = None
    condition: str | None = None

    @property
    def label(self) -> str:
        """The ending of the member that holds the label."""
        return "json" if self.label_key else "cls"

    def picture_among(self, endings: Iterable[str]) -> str | None:
        """Return which member is the picture."""
        for ending in endings:
            if ending == self.image if self.image else self._may_be_picture(ending):
                return ending
        return None

    def map_among(self, endings: Iterable[str]) -> str | None:
        """Return which member is the map; None where there are to be none."""
        return next(filter(self._is_map, endings), None) if self.condition else None

    def _may_be_picture(self, ending: str) -> bool:
        return f".{ending.rpartition('.')[2]}" in EXTENSIONS and not (self.condition and self._is_map(ending))

    def _is_map(self, ending: str) -> bool:
        return ending == self.condition or ending.startswith(f"{self.condition}.")
