"""Names of tar members.

The extension is everything after the first dot: `left.png` of `0001.left.png`.
"""

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vqf.data.images.decode import EXTENSIONS
from vqf.errors import UserError


@dataclass(frozen=True)
class SampleMembers:
    """The extensions of the members of a sample.

    Args:
        image: Image; by default the first image format.
        label_key: Field of `.json` with the label, by default that of `.cls`.
        condition: Condition map, or None: `depth` matches `depth.png`, `depth.tif`, `depth`.
    """

    image: str | None = None
    label_key: str | None = None
    condition: str | None = None

    @property
    def label_extension(self) -> str:
        return "json" if self.label_key else "cls"

    def find_image(self, extensions: Iterable[str]) -> str | None:
        for extension in extensions:
            if extension == self.image if self.image else _is_image(extension) and not self.is_map(extension):
                return extension
        return None

    def find_map(self, extensions: Iterable[str]) -> str | None:
        return next(filter(self.is_map, extensions), None) if self.condition else None

    def is_map(self, extension: str) -> bool:
        prefix = self.condition
        return prefix is not None and (
            extension == prefix or (extension.startswith(f"{prefix}.") and _is_image(extension))
        )


def split_member_name(name: str) -> tuple[str, str] | None:
    """Split a name at the first dot into key and lower-case extension; None if hidden or without extension."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem and dot else None


def check_member(tar: Path | str, info: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return key and extension of a member; None if it belongs to no sample.

    Raises:
        UserError: If the name is absolute, has `..`, a drive or control characters, or the member is sparse.
    """
    # No name is ever used as a path. Names that would leave a folder are refused all the same: no data set has them.
    name = info.name.removeprefix("./")
    parts = name.split("/")
    has_control = any(ord(character) < 32 or ord(character) == 127 for character in name)
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or has_control:
        raise UserError(f"data.root: the shard '{tar}' has a member with the unsafe name {info.name!a}")
    if info.isreg() and info.issparse():
        raise UserError(f"data.root: the shard '{tar}' has a sparse member '{name}'; pack it again without --sparse")
    return split_member_name(name)


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in EXTENSIONS
