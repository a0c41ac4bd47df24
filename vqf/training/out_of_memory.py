"""Out of memory in one line, with options that help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig, OmegaConf

from vqf.config.access import image_size
from vqf.distributed import comm
from vqf.errors import UserError

CHECKPOINTABLE = {"stage1": ("encoder", "decoder"), "stage2": ("prior",)}  # have `gradient_checkpointing`


@contextmanager
def explain_oom(where: str, kind: str, config: DictConfig) -> Iterator[None]:
    """Turn a failed allocation on the device or the host into one line.

    Args:
        where: Begins the line, as "stage1, step 3".
        kind: "stage1" or "stage2".

    Raises:
        UserError: If memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_oom(error):
            raise
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else "no memory left"
        same_run = ", ".join(_resume_hints(kind, config)) or "a larger device"
        raise UserError(
            f"{where}: out of memory ({reason}). Continue with resume=true and {same_run}; "
            f"or start a new run with {' or '.join(_restart_hints(config))}"
        ) from error


def _is_oom(error: Exception) -> bool:
    # The last is the CPU allocator's message; it raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _resume_hints(kind: str, config: DictConfig) -> Iterator[str]:
    candidates = range(config.accumulate + 1, config.batch_size + 1)
    if more := next((count for count in candidates if config.batch_size % (count * comm.world_size()) == 0), 0):
        yield f"accumulate={more}"
    if config.precision != "bf16":
        yield "precision=bf16"
    for component in CHECKPOINTABLE[kind]:
        if OmegaConf.select(config, f"model.{component}.gradient_checkpointing") is False:
            yield f"model.{component}.gradient_checkpointing=true"


def _restart_hints(config: DictConfig) -> Iterator[str]:
    if config.batch_size > 1:
        yield f"batch_size={config.batch_size // 2}"
    yield f"image_size={max(image_size(config)) // 2}"
