"""Images of a split as a protocol prepares them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqf import terminal
from vqf.batch import Batch
from vqf.dataloading.loader import DEFAULT_TIMEOUT, sequential_batches
from vqf.distributed import comm
from vqf.evaluation.preprocessing import round_to_8bit, to_uint8
from vqf.protocols import Split


@dataclass(frozen=True)
class EvaluationImages:
    """The images of a split.

    `source_hash` covers the split's fingerprint and its preprocessing, not the pixels.
    """

    split: Split
    source_hash: str
    count: int
    rounding: str
    batch_size: int
    workers: int
    device: torch.device
    timeout: float = DEFAULT_TIMEOUT

    def local_batches(self, description: str) -> Iterator[tuple[Batch, int]]:
        """Yield this process's share of every batch, and the batch's full size."""
        with terminal.progress(description, self.count) as bar:
            batches = sequential_batches(
                self.split, self.batch_size, count=self.count, workers=self.workers, timeout=self.timeout
            )
            for batch in batches:
                total = min(len(batch) * comm.world_size(), bar.remaining)
                yield round_real_images(batch.to(self.device), self.rounding), total
                bar.advance(total)

    def gathered_batches(self, description: str) -> Iterator[Tensor]:
        """Yield full batches in the main process; all processes must iterate."""
        for batch, count in self.local_batches(description):
            assert batch.images is not None
            images = comm.gather_rows(batch.images, count)
            if images is not None:
                yield images

    def hashed_batches(self, pixel_hash: "PixelHash", description: str) -> Iterator[Tensor]:
        for images in self.gathered_batches(description):
            pixel_hash.update(images)
            yield images


def round_real_images(batch: Batch, rounding: str) -> Batch:
    """Round real images to the nearest, also for "truncate"; "none" only clamps."""
    assert batch.images is not None
    return replace(batch, images=round_to_8bit(batch.images, "none" if rounding == "none" else "nearest"))


class PixelHash:
    """Hash of images in order, of 8-bit pixels or, without rounding, of floats."""

    def __init__(self, rounding: str) -> None:
        self.hasher, self.unrounded, self.started = hashlib.sha256(), rounding == "none", False

    def update(self, images: Tensor) -> None:
        if not self.started:
            self.hasher.update(repr(tuple(images.shape[1:])).encode())
            self.started = True
        values = images.float() if self.unrounded else to_uint8(images)
        self.hasher.update(values.cpu().contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        return self.hasher.hexdigest()[:16]
