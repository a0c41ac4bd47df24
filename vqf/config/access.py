"""Small things that every pipeline does."""

from omegaconf import DictConfig, OmegaConf

from vqf.batch import Size, pair

DEFAULT_IMAGE_SIZE = 256


def image_size(config: DictConfig) -> Size:
    """Read the image size of a config as height and width."""
    size = config.image_size
    return pair(OmegaConf.to_container(size) if OmegaConf.is_list(size) else size)  # type: ignore[arg-type]


def group_nodes(config: DictConfig, group: str) -> dict[str, DictConfig]:
    """Return the nodes of a group of which several are used at once; none where none is chosen."""
    return {str(name): node for name, node in (config.get(group) or {}).items() if node is not None}
