"""Build a data source and its splits."""

from omegaconf import DictConfig

from vqf.config.access import image_size
from vqf.errors import EmptySplitError, UserError
from vqf.protocols import Data, Split
from vqf.registry import build
from vqf.terminal import log

SPLITS = ("train", "validation")


def open_splits(config: DictConfig) -> tuple[Data, dict[str, Split]]:
    """Build the data source of a config, and its splits that are not empty.

    Raises:
        UserError: If there is no data source, or all splits are empty.
    """
    if config.data is None:
        raise UserError("data: none is chosen; give data=folder data.root=... or another")
    data: Data = build("data", config.data, image_size=image_size(config), seed=config.seed)
    splits, empty = {}, None
    for name in SPLITS:
        try:
            splits[name] = data.split(name)
        except EmptySplitError as error:
            log.info("no %s images: %s", name, error)
            empty = error
    if not splits:
        raise empty or AssertionError("every split either opens or raises")
    return data, splits
