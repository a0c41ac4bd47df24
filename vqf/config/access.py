"""Reads of a composed config."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.batch import Size, pair

DEFAULT_IMAGE_SIZE = 256


def image_size(config: DictConfig) -> Size:
    """`image_size` as (height, width) in pixels."""
    size: Any = config.image_size
    plain: Any = OmegaConf.to_container(size) if OmegaConf.is_list(size) else size
    return pair(plain)


def group_nodes(config: DictConfig, group: str) -> dict[str, DictConfig]:
    """Nodes of a group such as metric by name."""
    return {str(name): node for name, node in (config.get(group) or {}).items() if node is not None}
