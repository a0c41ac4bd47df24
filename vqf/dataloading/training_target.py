"""The option `target`: stage 1 learns images or condition maps."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from vqf.batch import Sample, Size
from vqf.errors import UserError, unknown_message
from vqf.images import condition_reader
from vqf.protocols import Data, Split
from vqf.registry import build

TRAINING_TARGETS = ("image", "condition")


def build_target_data(config: DictConfig, size: Size) -> Data:
    """Build the data source; with `target=condition` its samples are the condition maps.

    Raises:
        UserError: If `target` is neither image nor condition.
    """
    if config.target not in TRAINING_TARGETS:
        raise UserError(f"target={config.target}: {unknown_message('target', config.target, TRAINING_TARGETS)}")
    data = build("data", config.data, image_size=size, seed=config.seed)
    return data if config.target == "image" else ConditionMapsAsImages(data, config.data.name)


def target_is_class_map(config: DictConfig) -> bool:
    """Tell whether stage 1 learns class maps (one channel per class)."""
    reader = None if config.target == "image" else condition_reader(config.data)
    return reader is not None and reader.num_classes > 0


def data_channels(data: Data) -> int:
    """Return the channels of the first training image."""
    return data.split("train").item(0, 0).image.shape[0]


class ConditionMapsAsImages:
    """A data source that serves condition maps as images."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self.classes: Sequence[str] = data.classes

    def split(self, name: str) -> Split:
        return _ConditionMapSplit(self.data.split(name), self.name)


class _ConditionMapSplit:
    def __init__(self, split: Split, name: str) -> None:
        self.source_split, self.name = split, name
        self.fingerprint = f"{split.fingerprint}-condition"

    def __len__(self) -> int:
        return len(self.source_split)

    def item(self, epoch: int, index: int) -> Sample:
        sample = self.source_split.item(epoch, index)
        if sample.condition is None:
            raise UserError(
                f"target=condition: data '{self.name}' has no maps beside its images; pairs, shard_pairs, earth do"
            )
        return Sample(sample.condition, label=sample.label, crop_box=sample.crop_box)
