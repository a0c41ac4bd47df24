"""Atomic writes: a file or folder appears complete or not at all."""

import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY_SUFFIX = ".tmp"  # `atomic_path` writes .NAME.PID.tmp


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `final` when the block ends, or deleted if it fails.

    Until then an existing folder `final` is kept as `backup_path(final)`.

    Raises:
        OSError: If it cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        if final.exists():  # renamed, not deleted: at every moment one of the two is on disk
            shutil.rmtree(backup_path(final), ignore_errors=True)
            final.rename(backup_path(final))
        temporary.rename(final)
        fsync(final.parent)
        shutil.rmtree(backup_path(final), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def backup_path(final: Path) -> Path:
    """Name of the old folder while it is replaced."""
    return final.with_name(f".{final.name}.former")


def recover_interrupted(folder: Path, pattern: str) -> None:
    """Restore backups and delete temporary folders of killed writers in `folder`, for names like `pattern`."""
    for backup in folder.glob(f".{pattern}.former"):
        final = folder / backup.name[1:].removesuffix(".former")
        if final.exists():
            shutil.rmtree(backup, ignore_errors=True)
        else:
            backup.rename(final)
    for unfinished in folder.glob(f".{pattern}.tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` when the block ends.

    If the block deletes the temporary file, the old one is kept. The file mode follows the umask.

    Args:
        durable: Flush file and folder to disk.

    Raises:
        OSError: If it cannot be written; the temporary file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.exists():
            temporary.chmod(mode)
            if durable:
                fsync(temporary)
            temporary.replace(path)
            if durable:
                fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: Container[str]) -> None:
    """Delete the temporary files of killed writers of `names`. No writer of them may be running."""
    for temporary in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        if temporary.name[1:].removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] in names:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that is impossible.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to disk.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner can read
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path, metadata)
        path.chmod(mode)
        fsync(path)
    except SafetensorError as error:
        if match := re.search(r"os error (\d+)", str(error)):  # all that safetensors keeps of an OSError
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from error
        raise


def write_torch(states: Mapping[str, Any], path: Path) -> None:
    """Write a file for `torch.load`.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("wb") as file:
        recorder = _ErrorRecordingFile(file)
        try:
            torch.save(dict(states), cast(BinaryIO, recorder))
        except RuntimeError as error:
            raise recorder.error or error from None


class _ErrorRecordingFile:
    """Keeps the OSError that torch.save replaces."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
