"""The device of a process, by its name on the command line."""

import torch

from vqf.distributed import comm
from vqf.errors import UserError, unknown_message

CURE = "device=auto uses a GPU if there is one, device=cpu always works"


def find_device(name: str) -> torch.device:
    """Return a device that this machine has; "auto" is its accelerator, else the CPU.

    Raises:
        UserError: If the name is unknown, or there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    known = ["auto", "cpu", *([accelerator.type] if accelerator else [])]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: {unknown_message('device', name, [*known, 'cuda'])}") from error
    if device.type not in known:
        raise UserError(f"device={name}: {_why_absent(device.type)}; {CURE}")
    if accelerator and device.type == accelerator.type:
        _check_usable(device)
    return device


def find_rank_device(name: str) -> torch.device:
    """Return the device of one of several processes: its own GPU, or the CPU.

    Raises:
        UserError: If there are fewer GPUs than processes on this machine.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name}: several processes need device=cuda, a GPU each, or device=cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if comm.local_rank() >= gpus:
        raise UserError(f"device={name}: process {comm.local_rank()} of this machine has no GPU; there are {gpus}")
    device = find_device(f"cuda:{comm.local_rank()}")
    torch.cuda.set_device(device)
    return device


def _check_usable(device: torch.device) -> None:
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        names = ", ".join(f"{device.type}:{index}" for index in range(count))
        raise UserError(f"device={device}: this machine has {count} of them, {names}; {CURE}")
    try:
        torch.empty(0, device=device)  # fails here, not in the middle of building a model
    except RuntimeError as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}; {CURE}") from error


def _why_absent(kind: str) -> str:
    if kind == "meta":
        return "it holds no numbers"
    if kind == "cuda":
        built = torch.version.cuda or torch.version.hip
        return "torch finds no GPU here" if built else f"torch {torch.__version__} is built without CUDA"
    return "torch finds no such device here"
