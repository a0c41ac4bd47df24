"""What could not be read, in any process of a run: counted together, and named in the first one's log."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from vqf.distributed import comm
from vqf.distributed.log_relay import capture_logs, flush_relayed
from vqf.protocols import Split


@runtime_checkable
class TracksReadErrors(Protocol):
    """A split that notes which of its images cannot be read."""

    def read_error_flags(self) -> list[Tensor]: ...  # bool, shared with worker processes

    def check_read_errors(self) -> None: ...  # raises a UserError if they are too many


def sync_read_errors(split: Split) -> None:
    """Let every process of a run know what any of them could not read; every process must call.

    Raises:
        UserError: In all of them, if it is too much.
    """
    if comm.world_size() == 1 or not isinstance(split, TracksReadErrors):
        return  # a process by itself has counted what it found
    own = split.read_error_flags()
    for found in comm.all_gather_object([each.nonzero().flatten() for each in own]):
        for flags, places in zip(own, found, strict=True):
            flags[places] = True
    flush_relayed()
    with capture_logs():  # all would say the same
        split.check_read_errors()
