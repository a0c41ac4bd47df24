"""PSNR and SSIM, on pixels in [0, 1]."""

import itertools
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.errors import UserError
from vqf.metrics.running_mean import RunningMean, to_unit_range
from vqf.protocols import Reconstruction
from vqf.registry import register

MAX_PSNR = 100.0  # dB; a perfect reconstruction would make the mean infinite
WINDOW, SIGMA = 11, 1.5
TILE = 512  # pixels per side of what is compared at once


@register("metric", "psnr")
class PSNR:
    """Peak signal-to-noise ratio in dB, capped at 100.

    `psnr` is the mean over images, as papers report it; `psnr_pooled` is that of the overall mean squared error;
    `psnr_masked` weights pixels by masks, and skips images with an empty one.
    """

    higher_is_better: ClassVar = {"psnr": True, "psnr_pooled": True, "psnr_masked": True}

    def __init__(self, device: torch.device | str) -> None:
        self.psnr, self.mse, self.masked = RunningMean(device), RunningMean(device), RunningMean(device)

    def update(self, batch: Reconstruction) -> None:
        sums = [(to_unit_range(x) - to_unit_range(y)).square().sum((1, 2, 3)) for x, y in _tiles(batch, 0)]
        errors = torch.stack(sums).sum(0) / batch.images[0].numel()
        self.mse.update(errors)
        self.psnr.update(_to_db(errors))
        if batch.masks is not None:
            squares = (to_unit_range(batch.reconstructions) - to_unit_range(batch.images)).square()
            masks = batch.masks.to(squares)
            mask_area = masks.sum((1, 2, 3))
            masked = (squares.mean(1, keepdim=True) * masks).sum((1, 2, 3)) / mask_area
            self.masked.update(_to_db(masked[mask_area > 0]))

    def compute(self) -> dict[str, float]:
        pooled = float(_to_db(self.mse.total / self.mse.count))
        values = {"psnr": self.psnr.compute(), "psnr_pooled": pooled}
        return values | ({"psnr_masked": self.masked.compute()} if self.masked.count else {})

    def intervals(self) -> dict[str, tuple[float, float]]:
        masked = {"psnr_masked": self.masked.interval()} if self.masked.count else {}
        return {"psnr": self.psnr.interval()} | masked


@register("metric", "ssim")
class SSIM:
    """Structural similarity, mean over color channels, positions and images.

    Image Quality Assessment: From Error Visibility to Structural Similarity,
    https://www.cns.nyu.edu/pub/eero/wang03-reprint.pdf: Gaussian window of 11 x 11 inside the image, sigma 1.5,
    K1 = 0.01, K2 = 0.03.
    """

    higher_is_better: ClassVar = {"ssim": True}

    def __init__(self, device: torch.device | str) -> None:
        self.mean = RunningMean(device)

    def update(self, batch: Reconstruction) -> None:
        """Add a batch.

        Raises:
            UserError: If images are below 11 x 11.
        """
        if min(batch.images.shape[2:]) < WINDOW:
            raise UserError(f"metric 'ssim' needs images of {WINDOW} x {WINDOW} or more, not {_size(batch.images)}")
        tiles = _tiles(batch, WINDOW - 1)
        sums = [similarity(to_unit_range(x), to_unit_range(y)).sum((1, 2, 3)) for x, y in tiles]
        height, width = (side - WINDOW + 1 for side in batch.images.shape[2:])
        self.mean.update(torch.stack(sums).sum(0) / (batch.images.shape[1] * height * width))

    def compute(self) -> dict[str, float]:
        return {"ssim": self.mean.compute()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {"ssim": self.mean.interval()}


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Compare images (B, C, H, W) in [0, 1] at all positions of the window: (B, C, H - 10, W - 10)."""
    moments = _gaussian_average(torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2))
    mu_x, mu_y, xx, yy, xy = moments.unflatten(0, (5, *x.shape[:2]))
    c1, c2 = 0.01**2, 0.03**2
    var_x, var_y, covariance = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    numerator = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    return numerator / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))


def _tiles(batch: Reconstruction, overlap: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield reconstructions and images in tiles, whose float64 copies need less memory than those of large images."""
    rows, columns = (range(0, side - overlap, TILE) for side in batch.images.shape[2:])
    for top, left in itertools.product(rows, columns):
        place = (..., slice(top, top + TILE + overlap), slice(left, left + TILE + overlap))
        yield batch.reconstructions[place], batch.images[place]


def _gaussian_average(planes: Tensor) -> Tensor:
    height, width = planes.shape[1:]
    return _window_matrix(height, planes) @ planes @ _window_matrix(width, planes).T


def _window_matrix(size: int, like: Tensor) -> Tensor:
    """Filter matrix (size - 10, size), faster than a float64 convolution."""
    offsets = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = torch.softmax(-(offsets**2) / (2 * SIGMA**2), 0)
    return torch.stack([F.pad(weights, (i, size - WINDOW - i)) for i in range(size - WINDOW + 1)])


def _to_db(errors: Tensor) -> Tensor:
    return (-10 * errors.log10()).clamp(max=MAX_PSNR)


def _size(images: Tensor) -> str:
    return f"{images.shape[2]} x {images.shape[3]}"
