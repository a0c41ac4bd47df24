"""Names of tar members.

The extension is everything after the first dot: `left.png` of `0001.left.png`.
"""

import tarfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqf.data.images.decode import EXTENSIONS
from vqf.errors import UserError

MemberKey = Literal["first_dot", "last_dot"]


@dataclass(frozen=True)
class SampleMembers:
    """The extensions of the members of a sample.

    Args:
        image: Image; by default the first image format, `jpg` before `depth.png`.
        label_key: Field of `.json` with the label, by default that of `.cls`.
        condition: Condition map, or None: `depth` matches `depth.png`, `depth.tif`, `depth`.
        key: The dot of a member's name at which its extension begins.
    """

    image: str | None = None
    label_key: str | None = None
    condition: str | None = None
    key: MemberKey = "first_dot"

    def split(self, key: str, extension: str) -> tuple[str, str]:
        """Move the end of the key to the dot that `self.key` names; both are given for the first."""
        if self.key == "first_dot":
            return key, extension
        rest, dot, last = extension.rpartition(".")
        return f"{key}{dot}{rest}", last

    @property
    def label_extension(self) -> str:
        return "json" if self.label_key else "cls"

    def find_image(self, extensions: Collection[str]) -> str | None:
        if self.image:
            return self.image if self.image in extensions else None
        images = [each for each in extensions if is_image_extension(each) and not self.is_map(each)]
        return min(images, key=lambda extension: "." in extension, default=None)

    def find_map(self, extensions: Iterable[str]) -> str | None:
        return next(filter(self.is_map, extensions), None) if self.condition else None

    def is_map(self, extension: str) -> bool:
        prefix = self.condition
        return prefix is not None and (
            extension == prefix or (extension.startswith(f"{prefix}.") and is_image_extension(extension))
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


def is_image_extension(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in EXTENSIONS
