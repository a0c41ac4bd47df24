"""What could not be read, in any process of a run: counted together, and named in the first one's log."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from vqf.distributed import comm
from vqf.distributed.log_relay import noted, pass_on
from vqf.protocols import Split


@runtime_checkable
class Faulty(Protocol):
    """A split that notes which of its pictures cannot be read."""

    def faults(self) -> list[Tensor]: ...  # bool, shared with worker processes

    def check_faults(self) -> None: ...  # raises a UserError if they are too many


def agree(split: Split) -> None:
    """Let every process of a run know what any of them could not read; every process must call.

    Raises:
        UserError: In all of them, if it is too much.
    """
    if comm.world() == 1 or not isinstance(split, Faulty):
        return  # a process by itself has counted what it found
    own = split.faults()
    for found in comm.each([each.nonzero().flatten() for each in own]):
        for flags, places in zip(own, found, strict=True):
            flags[places] = True
    pass_on()
    with noted():  # all would say the same
        split.check_faults()
