"""Weight files: download, checksum, safe reading."""

import errno
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.hashing import sha256_of_file, sha256_of_tensors
from vqf.networks.file_content import describe_content, is_safetensors


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
    """Read the tensors of a file of safetensors or torch.save, by its content, without executing pickled code.

    Raises:
        UserError: If it is not a weight file; the message says what it is.
    """
    content = read_safetensors(path) if is_safetensors(path) else read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a weight file: it holds one {type(content).__name__}, not tensors by name")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU.

    Raises:
        UserError: If it is another file, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise not_weights_error(path) from error


def read_torch_file(path: Path) -> Any:
    """Read a file of torch.save that holds only tensors and plain containers, on the CPU.

    Raises:
        UserError: If it is another file, or holds anything else.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():  # by its name torch would choose another format
            warnings.simplefilter("ignore")  # torch warns about files that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a seek beyond the end of half a file
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        # torch's own message advises weights_only=False, which would run the file's code.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path}: not a weight file: it names '{refused[1]}', which is neither a tensor nor a plain container; "
                "save its state_dict alone with torch.save"
            ) from error
        raise not_weights_error(path) from error


def not_weights_error(path: Path) -> UserError:
    """Make the error for a file that cannot be read as weights."""
    return UserError(f"{path}: not a weight file: {describe_content(path)}")


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


def check_dtypes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the kinds of numbers, which torch would convert in silence; any float may become any other.

    Raises:
        ValueError: Naming the first tensor of another kind.
    """
    for name in weights.keys() & expected.keys():
        if problem := dtype_problem(weights[name], expected[name]):
            raise ValueError(f"'{name}' {problem}")


def dtype_problem(tensor: Tensor, expected: Tensor) -> str | None:
    """Say that a tensor has another kind of number than the one it is for: "holds bool, not float32"."""
    if _kind_of(tensor.dtype) == _kind_of(expected.dtype):
        return None
    return f"holds {_dtype_name(tensor.dtype)}, not {_dtype_name(expected.dtype)}"


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity, with one wait for their device."""
    floats = {name: each.detach() for name, each in tensors.items() if each.is_floating_point() or each.is_complex()}
    if not floats:
        return []
    finite = torch.stack([each.isfinite().all() for each in floats.values()]).tolist()
    return [name for name, is_finite in zip(floats, finite, strict=True) if not is_finite]


def _kind_of(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "complex" if dtype.is_complex else "float"
    return "bool" if dtype == torch.bool else "integer"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
