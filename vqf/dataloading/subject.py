"""Which picture of a sample stage 1 learns: the image, or the map beside it."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from vqf.batch import Sample, Size
from vqf.errors import UserError, unknown
from vqf.images import condition_reader
from vqf.protocols import Data, Split
from vqf.registry import build

SUBJECTS = ("image", "condition")


def build_subject(config: DictConfig, size: Size) -> Data:
    """Build the data source of a config, whose samples show what `subject` says.

    Raises:
        UserError: If there is no such subject, or the data has no maps.
    """
    if config.subject not in SUBJECTS:
        raise UserError(f"subject={config.subject}: {unknown('subject', config.subject, SUBJECTS)}")
    data = build("data", config.data, image_size=size, seed=config.seed)
    return data if config.subject == "image" else Maps(data, config.data.name)


def shows_classes(config: DictConfig) -> bool:
    """Tell whether stage 1 learns maps of classes, which have a channel for each."""
    reader = None if config.subject == "image" else condition_reader(config.data)
    return reader is not None and reader.classes > 0


def channels_of(data: Data) -> int:
    """Return the channels of the pictures of a data source, as its first one has them."""
    return data.split("train").item(0, 0).image.shape[0]


class Maps:
    """The maps of a data source, in place of its pictures."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self.classes: Sequence[str] = data.classes

    def split(self, name: str) -> Split:
        """Return "train" or "validation"."""
        return _MapSplit(self.data.split(name), self.name)


class _MapSplit:
    def __init__(self, split: Split, name: str) -> None:
        self.pictures, self.name = split, name
        self.fingerprint = f"{split.fingerprint}-condition"

    def __len__(self) -> int:
        return len(self.pictures)

    def item(self, epoch: int, index: int) -> Sample:
        sample = self.pictures.item(epoch, index)
        if sample.condition is None:
            raise UserError(
                f"subject=condition: data '{self.name}' has no maps beside its pictures; pairs, shard_pairs, earth do"
            )
        return Sample(sample.condition, label=sample.label, place=sample.place)
