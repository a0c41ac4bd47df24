"""Out of memory, in words: which options lower it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig, OmegaConf

from vqf.config.access import image_size
from vqf.distributed import comm
from vqf.errors import UserError

CHECKPOINTABLE = {"stage1": ("encoder", "decoder"), "stage2": ("prior",)}


@contextmanager
def explain_oom(where: str, kind: str, config: DictConfig) -> Iterator[None]:
    """Turn a failed allocation into one line.

    Args:
        where: What was going on.
        kind: "stage1" or "stage2".
        config: Whose values are named.

    Raises:
        UserError: If memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_oom(error):
            raise
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else "no memory left"
        cures, others = ", ".join(_resume_hints(kind, config)), " or ".join(_restart_hints(config))
        raise UserError(
            f"{where}: out of memory ({reason}). Go on with resume=true and {cures or 'a larger device'}; "
            f"or begin another run with {others}"
        ) from error


def _is_oom(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _resume_hints(kind: str, config: DictConfig) -> Iterator[str]:
    """Yield what lowers it in the same run."""
    parts = range(config.accumulate + 1, config.batch_size + 1)
    if more := next((each for each in parts if config.batch_size % (each * comm.world_size()) == 0), 0):
        yield f"accumulate={more}"
    if config.precision != "bf16":
        yield "precision=bf16"
    for part in CHECKPOINTABLE[kind]:
        if OmegaConf.select(config, f"model.{part}.gradient_checkpointing") is False:
            yield f"model.{part}.gradient_checkpointing=true"


def _restart_hints(config: DictConfig) -> Iterator[str]:
    if config.batch_size > 1:
        yield f"batch_size={config.batch_size // 2}"
    yield f"image_size={max(image_size(config)) // 2}"
