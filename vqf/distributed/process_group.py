"""Joining and leaving the process group of torchrun, or a launcher like it.

It sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without them the process works alone.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from vqf.distributed import comm, peer_errors
from vqf.errors import UserError

TIMEOUT = timedelta(minutes=30)  # of every collective: the longest that one rank waits for another

# Launchers that start processes without setting the variables, with a variable that holds the process count.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group of the launcher's processes, and leave it at the end.

    Raises:
        UserError: If variables are missing, or the processes do not find each other.
    """
    if comm.is_initialized() or not _is_launched():
        yield
        return
    # Before there is a group: functions of this module have the group of import time as a default argument, and would
    # keep it alive after `destroy_process_group`.
    import torch.distributed.nn

    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        peer_errors.connect(store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other: {str(error).splitlines()[0]}") from error
    peer_errors.exchange_process_ids()
    try:
        yield
        comm.barrier()  # rank 0 holds the store, so it must not leave first
    except Exception as error:
        peer_errors.post_failure(str(error))  # before the other ranks see a broken connection
        raise
    finally:
        _leave_group()
        peer_errors.wait_for_peers(world_size)


def _leave_group() -> None:
    """Leave the group and end its threads, which could abort the process at its exit.

    They end with the last reference to the group; DDP's is part of a cycle, hence the collection.
    """
    gc.collect()
    dist.destroy_process_group()


def _is_launched() -> bool:
    address = {"MASTER_ADDR", "MASTER_PORT"}
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and (absent := sorted({"RANK", *address} - os.environ.keys())):
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {absent[0]}: start the processes with torchrun")
    if "WORLD_SIZE" not in os.environ:
        _check_single_process()
    return address | {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _check_single_process() -> None:
    for variable, launcher in LAUNCHERS.items():
        if (count := os.environ.get(variable, "1")) not in ("", "1"):
            raise UserError(
                f"{launcher} has started {count} processes ({variable}) that cannot find each other: let it start "
                "torchrun on every node, as examples/slurm/train.sbatch does; or one process, as srun -n 1 does"
            )
