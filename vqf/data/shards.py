"""Tar shards in the layout of webdataset (https://github.com/webdataset/webdataset).

Members up to the first dot of their names are one sample: `0001.jpg` and `0001.cls`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Interval

from vqf.batch import Size, pair
from vqf.data.images.augment import (
    DEFAULT_CROP_AREA,
    DEFAULT_CROP_RATIO,
    NO_JITTER,
    Augmentation,
    Crop,
    CropArea,
    CropRatio,
    Jitter,
    Resize,
)
from vqf.data.images.decode import MAX_PIXELS, Animated
from vqf.data.images.pixel_values import PixelRange, check_range
from vqf.data.labels import MAX_CLASSES, NumericLabels
from vqf.data.tar.contents import IndexedShards
from vqf.data.tar.dataset import ShardSplit
from vqf.data.tar.members import MemberKey, SampleMembers
from vqf.data.tar.patterns import is_streamed
from vqf.data.tar.remote import RemoteShards, StreamedShards
from vqf.data.tar.shard_folder import ShardFolder
from vqf.data.tar.streaming import StreamSplit
from vqf.errors import EmptySplitError, UserError, unknown_message
from vqf.options.ranges import Fraction, PositiveInt
from vqf.registry import register


@register("data", "shards")
class Shards:
    """Tar shards of webdataset: images with labels from `.cls`, from a field of `.json`, or none.

    Each shard gets an index beside it, `name.tar.idx`, on first use; the order of images is then exact. Truncated
    shards, missing shards whose index is left, and broken images count as unreadable.

    Shards at a URL are streamed without an index: validation in order, training shuffled, in an order that depends on
    the numbers of ranks and workers.

    Args:
        root: The folder of the shards, or its URL.
        train: The training shards, relative to the root, or URLs: webdataset's braces, such as
            `train-{0000..0146}.tar`, or wildcards, such as `train-*.tar`; several patterns are joined by `::`.
        validation: The same for validation.
        train_images: Number of images in streamed training shards, if there is no `manifest.json` of pipeline=shard
            beside them.
        validation_images: The same for validation.
        buffer: Size of the shuffle buffer of a stream, in images per loading process.
        labels: Whether labels are read.
        numeric_labels: Whether labels that all are whole numbers are the class numbers ("index"), or names, which are
            numbered in order of their values ("name"); a stream knows only class numbers.
        label_key: The field of `.json` with the label; by default the label is the content of `.cls`.
        classes: Number of classes, where labels are numbers; by default from the shards or the manifest. 0 ignores the
            labels of a stream.
        image: Extension of the image, where samples have several; by default the first that is an image format, of one
            word (`jpg`) before those of several (`depth.png`).
        key: Where the name of a member ends and its extension begins; members with one name are one sample. With
            "last_dot" `v1.0.png` and `v1.1.png` are two.
        index: Folder of the indices; by default that of each shard.
        crop: Where training images are cropped; validation images are center-cropped. "resized" is torchvision's
            RandomResizedCrop.
        crop_area: Smallest and largest area of a "resized" crop, as fractions of the image's area.
        crop_ratio: Smallest and largest aspect ratio (width / height) of a "resized" crop, relative to that of the
            image size.
        flip: Mirror each training image with probability 1/2.
        jitter: Strength of random changes of brightness, contrast, saturation and hue of training images.
        resize: "antialias" is bicubic; "cv2" is OpenCV's bilinear without antialiasing, as in taming-transformers.
        range: The values that become black and white in gray images of more than 8 bits, as in [0,4095] for 12 bits;
            values beyond are clipped. By default 0 and 65535. Images of 8 bits are not changed.
        animated: Whether an animation counts as unreadable, or its first frame is the image.
        max_pixels: Largest image that is decoded, width times height.
        max_unreadable: Fraction of unreadable or missing images, and of truncated shards, above which the run
            stops; one is allowed unless 0. The next readable image replaces an unreadable one.
    """

    condition: str | None = None  # extension of condition maps; set by subclasses

    def __init__(
        self,
        image_size: int | Size,
        seed: int,
        *,
        root: str | None = None,
        train: str | None = "train-*.tar",
        validation: str | None = "validation-*.tar",
        train_images: PositiveInt | None = None,
        validation_images: PositiveInt | None = None,
        buffer: PositiveInt = 1000,
        labels: bool = True,
        numeric_labels: NumericLabels = "index",
        label_key: str | None = None,
        classes: Annotated[int, Interval(ge=0, le=MAX_CLASSES)] | None = None,
        image: str | None = None,
        key: MemberKey = "first_dot",
        index: str | None = None,
        crop: Crop = "random",
        crop_area: CropArea = DEFAULT_CROP_AREA,
        crop_ratio: CropRatio = DEFAULT_CROP_RATIO,
        flip: bool = True,
        jitter: Jitter = NO_JITTER,
        resize: Resize = "antialias",
        range: PixelRange | None = None,
        animated: Animated = "refuse",
        max_pixels: PositiveInt = MAX_PIXELS,
        max_unreadable: Fraction = 0.01,
    ) -> None:
        self.size, self.seed = pair(image_size), seed
        self.augmentation = Augmentation(crop, crop_area, crop_ratio, flip, jitter, resize)
        self.pixel_range = check_range("range", range)
        self.animated, self.max_pixels, self.max_unreadable = animated, max_pixels, max_unreadable
        self.shuffle_buffer = buffer
        self.member_roles = SampleMembers(normalize_extension(image), label_key, self.condition, key)
        self.patterns = {"train": train, "validation": validation}
        self.remote: RemoteShards | None = None
        self.folder: ShardFolder | None = None
        if any(is_streamed(root, pattern, f"data.{name}") for name, pattern in self.patterns.items() if pattern):
            lengths = {"train": train_images, "validation": validation_images}
            self.remote = RemoteShards(root, self.patterns, lengths, classes if labels else 0)
            self.classes = self.remote.classes
            self.check_manifest(self.remote.manifest)
        else:
            index_folder = None if index is None else Path(index).expanduser()
            self.folder = ShardFolder(root, index_folder, self.member_roles, max_unreadable)
            self.root = self.folder.root
            self.check_manifest(self.folder.manifest)  # before the long work
            self.folder.index_splits(self.patterns, labels)
            self.classes, self.class_numbers = self.folder.class_numbers(classes, numeric_labels)

    def split(self, name: str) -> ShardSplit | StreamSplit:
        """Return a split.

        Raises:
            EmptySplitError: If it has no images.
        """
        if name not in self.patterns:
            raise UserError(unknown_message("split", name, self.patterns))
        if self.remote is not None:
            return self.streamed_split(name, self.remote.shards_of(name))
        assert self.folder is not None, "shards are in a folder or at a URL"
        contents = self.folder.contents[name]
        if not contents.names:
            raise EmptySplitError(f"data.{name}={self.patterns[name]}: no images in matching shards of '{self.root}'")
        labels = torch.tensor([self.class_numbers[label] for label in contents.labels]) if self.classes else None
        return self.indexed_split(name, contents, labels)

    def indexed_split(self, name: str, contents: IndexedShards, labels: torch.Tensor | None) -> ShardSplit:
        return ShardSplit(self, name, contents, labels)

    def streamed_split(self, name: str, stream: StreamedShards) -> StreamSplit:
        return StreamSplit(self, name, stream)

    def check_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Refuse shards for other options; a hook for subclasses."""

    def digests(self) -> dict[Path, str]:
        return self.folder.digests() if self.folder else {}


def normalize_extension(option: str | None) -> str | None:
    """Convert an extension to lower case without a leading dot."""
    return None if option is None else option.lower().lstrip(".")
