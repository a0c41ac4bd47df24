"""Files of weights: where they are had, that they are what they should be, and reading them without running them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.hashing import sha256_of_file, sha256_of_tensors


def hub_file(url: str, description: str, hint: str) -> Path:
    """Return a file of torch's hub folder, downloaded if it is not there and its sha256 starts as its name ends.

    Raises:
        UserError: If it cannot be had: says what it is, where to put it, and the cure.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of what came is wrong
        raise UserError(f"cannot get {description} ({error}): put {url} at {file}, or set {hint}") from error
    return file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, .safetensors or torch's, without running what it may hold.

    Raises:
        UserError: If it holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{path}: not a file of weights ({str(error).splitlines()[0]})") from error


def verify_checksum(path: Path) -> Path:
    """Compare a file with the head of its sha256 that its name ends in."""
    if not sha256_of_file(path).startswith(path.stem.rpartition("-")[2]):
        raise UserError(
            f"{path}: damaged, its sha256 does not start as its name says; delete it or reinstall its package"
        )
    return path


def fingerprint(module: nn.Module, *facts: object) -> str:
    """Hash the weights of a network, and facts about its use, to 16 digits."""
    return sha256_of_tensors(module.state_dict(), *facts)[:16]
