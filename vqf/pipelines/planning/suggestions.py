"""Config overrides that lower the memory of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.training.out_of_memory import CHECKPOINTABLE

Overrides = Mapping[str, Any]  # values by dotted keys


def suggestions(name: str, config: DictConfig, world: int) -> Iterator[list[Overrides]]:
    """Yield families of overrides that lower the memory of a stage, each in the order of their cost in speed."""
    accumulate: list[Overrides] = [
        {"accumulate": n} for n in range(config.accumulate + 1, config.batch_size + 1) if config.batch_size % n == 0
    ]
    yield accumulate
    checkpointing = {
        key: True
        for key in (f"model.{kind}.gradient_checkpointing" for kind in CHECKPOINTABLE[name])
        if OmegaConf.select(config, key) is False
    }
    bf16 = {"precision": "bf16"} if config.precision != "bf16" else {}
    fsdp = {"engine": "fsdp2"} if world > 1 and config.engine != "fsdp2" else {}
    both = {**bf16, **checkpointing} if bf16 and checkpointing else {}
    for overrides in (bf16, checkpointing, fsdp, both):
        if overrides:
            yield [overrides, *({**overrides, **micro_batches} for micro_batches in accumulate)]


def overrides_to_cli(overrides: Overrides) -> str:
    """Write overrides as on the command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()
    )


def with_overrides(config: DictConfig, name: str, overrides: Overrides) -> DictConfig:
    """Return the config with overrides for one stage."""
    config = config.copy()
    with open_dict(config):
        for key, value in overrides.items():
            dotted = f"stage2.{key}" if name == "stage2" and key in config.stage2 else key
            OmegaConf.update(config, dotted, value)
    return config
