"""PSNR and SSIM, on pixels in [0, 1]."""

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
        squares = (to_unit_range(batch.reconstructions) - to_unit_range(batch.images)).square()
        errors = squares.mean((1, 2, 3))
        self.mse.update(errors)
        self.psnr.update(_to_db(errors))
        if batch.masks is not None:
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
        self.mean.update(ssim(to_unit_range(batch.reconstructions), to_unit_range(batch.images)))

    def compute(self) -> dict[str, float]:
        return {"ssim": self.mean.compute()}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {"ssim": self.mean.interval()}


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compare images (B, C, H, W) in [0, 1] -> (B,)."""
    moments = _gaussian_average(torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2))
    mu_x, mu_y, xx, yy, xy = moments.unflatten(0, (5, *x.shape[:2]))
    c1, c2 = 0.01**2, 0.03**2
    var_x, var_y, covariance = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    return (similarity / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


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
