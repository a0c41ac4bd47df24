"""Batch norm over the images of all processes.

Batch Normalization, https://arxiv.org/abs/1502.03167; MegDet, https://arxiv.org/abs/1711.07240.
"""

import torch
from torch import Tensor, nn

from vqf.distributed import comm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with training statistics over equally many images of every process.

    `torch.nn.SyncBatchNorm` has no second derivative, which R1 takes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or comm.world_size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = comm.all_reduce_sum_with_grad(wide.mean((0, 2, 3))) / comm.world_size()
        centered = wide - mean[:, None, None]
        variance = comm.all_reduce_sum_with_grad(centered.square().mean((0, 2, 3))) / comm.world_size()
        self._update_running_stats(mean.detach(), variance.detach(), x.numel() // x.shape[1] * comm.world_size())
        normal = centered * (variance + self.eps).rsqrt()[:, None, None]
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
