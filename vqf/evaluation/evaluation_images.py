"""Images of a split as a protocol prepares them, in batches over all processes, and the hash of their pixels."""

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
    """The images of a split, as a protocol prepares them.

    Attributes:
        source_hash: Of the split's fingerprint and its preprocessing; images are not opened for it.
        count: Images, spread evenly over the split.
        rounding: See `round_real_images`.
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
        """Yield this process's share of every batch, on the device, and the size of the batch over all processes.

        Args:
            description: Title of the progress bar.
        """
        with terminal.progress(description, self.count) as bar:
            batches = sequential_batches(
                self.split, self.batch_size, count=self.count, workers=self.workers, timeout=self.timeout
            )
            for batch in batches:
                total = min(len(batch) * comm.world_size(), bar.remaining)
                yield round_real_images(batch.to(self.device), self.rounding), total
                bar.advance(total)

    def gathered_batches(self, description: str) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of full batches in the main process; a collective, so all processes iterate."""
        for batch, count in self.local_batches(description):
            assert batch.images is not None
            images = comm.gather_rows(batch.images, count)
            if images is not None:
                yield images

    def hashed_batches(self, pixel_hash: "PixelHash", description: str) -> Iterator[Tensor]:
        """Yield `gathered_batches`, each added to a hash."""
        for images in self.gathered_batches(description):
            pixel_hash.update(images)
            yield images


def round_real_images(batch: Batch, rounding: str) -> Batch:
    """Round real images to the nearest 8-bit value, also for "truncate"; with "none", only clamp them."""
    assert batch.images is not None
    return replace(batch, images=round_to_8bit(batch.images, "none" if rounding == "none" else "nearest"))


class PixelHash:
    """A hash of images in order, independent of the batch size: of 8-bit pixels, or of floats for rounding "none"."""

    def __init__(self, rounding: str) -> None:
        self.hasher, self.unrounded, self.started = hashlib.sha256(), rounding == "none", False

    def update(self, images: Tensor) -> None:
        """Add images (B, C, H, W) in [-1, 1]."""
        if not self.started:
            self.hasher.update(repr(tuple(images.shape[1:])).encode())
            self.started = True
        values = images.float() if self.unrounded else to_uint8(images)
        self.hasher.update(values.cpu().contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        """Return 16 hexadecimal digits."""
        return self.hasher.hexdigest()[:16]
