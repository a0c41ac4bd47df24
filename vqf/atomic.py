"""Files and folders that are either whole or not there, also when the process is killed or the disk is full."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY_SUFFIX = ".tmp"  # of `atomic_path`: .NAME.PID.tmp


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Write a folder under a temporary name, flush it, and rename it when it is complete.

    Where there is one of that name, it stays as `backup_path` until the new one is there.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        if final.exists():  # the same step again: at no moment there is none
            shutil.rmtree(backup_path(final), ignore_errors=True)
            final.rename(backup_path(final))
        temporary.rename(final)
        fsync(final.parent)
        shutil.rmtree(backup_path(final), ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def backup_path(final: Path) -> Path:
    """Return where a folder stays while another takes its name."""
    return final.with_name(f".{final.name}.former")


def recover_interrupted(folder: Path, pattern: str) -> None:
    """Clear what killed writers left of the folders of a pattern inside of a folder."""
    for left in folder.glob(f".{pattern}.former"):
        final = folder / left.name[1:].removesuffix(".former")
        if final.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(final)
    for unfinished in folder.glob(f".{pattern}.tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file in the same folder, which takes the name `path` when the block ends.

    A process that is killed leaves the old file or the new one. A block that deletes the temporary file keeps the old
    one. The mode follows the umask, whatever the writer makes of it.

    Args:
        path: The final name; its folder is made where it is missing.
        durable: Flush file and folder to disk, so that the new file also outlives a crash of the machine.

    Raises:
        OSError: If it cannot be written; nothing of it is left then.
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


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file by a whole one, in UTF-8; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; a copy of it, where the disk knows no such thing.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, and flush it to disk.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        path.touch()
        mode = path.stat().st_mode  # safetensors would leave a file that only its owner can read
        save_file({key: each.detach().contiguous() for key, each in tensors.items()}, path, metadata)
        path.chmod(mode)
        fsync(path)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):  # the number is all it keeps of an OSError
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def write_torch(states: Mapping[str, Any], path: Path) -> None:
    """Write what `torch.load` reads.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("wb") as file:
        kept = _ErrorRecordingFile(file)
        try:
            torch.save(dict(states), kept)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise kept.error or error from None


class _ErrorRecordingFile:
    """A file that remembers why it could not be written: torch tells that in words of its own."""

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
    """See to it that a file or folder outlives the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
