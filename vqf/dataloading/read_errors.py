"""Unreadable images, counted over all ranks."""

from vqf.distributed import comm
from vqf.distributed.log_relay import capture_logs, flush_relayed
from vqf.protocols import Split, TracksReadErrors


def sync_read_errors(split: Split) -> None:
    """Merge the unreadable images of all ranks. Collective: every rank must call it.

    Raises:
        UserError: On every rank, if there are too many.
    """
    if comm.world_size() == 1 or not isinstance(split, TracksReadErrors):
        return  # a single process counts its own errors when it reads
    flags = split.read_error_flags()
    for indices_of_rank in comm.all_gather_object([flag.nonzero().flatten() for flag in flags]):
        for flag, indices in zip(flags, indices_of_rank, strict=True):
            flag[indices] = True
    flush_relayed()
    with capture_logs():  # every rank would log the same
        split.check_read_errors()
