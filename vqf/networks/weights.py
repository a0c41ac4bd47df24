"""Weight files: download, checksum, safe reading."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.hashing import sha256_of_file, sha256_of_tensors


def hub_file(url: str, description: str, hint: str) -> Path:
    """Return a file in torch's hub folder; download it if absent, and check the sha256 in its name.

    Raises:
        UserError: If it cannot be downloaded; the message ends with `hint`.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash of the download is wrong
        raise UserError(f"cannot get {description} ({error}): put {url} at {file}, or set {hint}") from error
    return file


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weight file without executing pickled code.

    Raises:
        UserError: If it is not a weight file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{path}: not a weight file ({str(error).splitlines()[0]})") from error


def verify_checksum(path: Path) -> Path:
    """Check that a file's sha256 begins with the digits in its name."""
    if not sha256_of_file(path).startswith(path.stem.rpartition("-")[2]):
        raise UserError(
            f"{path}: damaged (its sha256 differs from the one in its name); delete it or reinstall its package"
        )
    return path


def fingerprint(module: nn.Module, *facts: object) -> str:
    """Hash weights and further facts to 16 hex digits."""
    return sha256_of_tensors(module.state_dict(), *facts)[:16]
