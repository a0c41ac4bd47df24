"""Which options lower what a run needs, and configs with them."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.training.out_of_memory import CHECKPOINTABLE

Overrides = Mapping[str, Any]  # options by their dotted keys


def suggestions(name: str, config: DictConfig, world: int) -> Iterator[list[Overrides]]:
    """Yield families of options that lower the memory of a stage, each from the mildest on.

    Args:
        name: "stage1" or "stage2".
        config: Of one process of the stage.
        world: Processes.
    """
    split: list[Overrides] = [
        {"accumulate": n} for n in range(config.accumulate + 1, config.batch_size + 1) if config.batch_size % n == 0
    ]
    yield split
    again = {
        key: True
        for key in (f"model.{part}.gradient_checkpointing" for part in CHECKPOINTABLE[name])
        if OmegaConf.select(config, key) is False
    }
    narrow = {"precision": "bf16"} if config.precision != "bf16" else {}
    shared = {"engine": "fsdp2"} if world > 1 and config.engine != "fsdp2" else {}
    both = {**narrow, **again} if narrow and again else {}
    firsts: list[Overrides] = [each for each in (narrow, again, shared, both) if each]
    for first in firsts:
        yield [first, *({**first, **each} for each in split)]


def overrides_to_cli(overrides: Overrides) -> str:
    """Write options as they stand on the command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()
    )


def with_overrides(config: DictConfig, name: str, overrides: Overrides) -> DictConfig:
    """Return a config of a whole run with other options for a stage."""
    config = config.copy()
    with open_dict(config):
        for key, value in overrides.items():
            place = f"stage2.{key}" if name == "stage2" and key in config.stage2 else key
            OmegaConf.update(config, place, value)
    return config
