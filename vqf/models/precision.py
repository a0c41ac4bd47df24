"""Quantizers of models that were moved to half precision, as by `tokenizer.half()`."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vqf.protocols import Quantized, Quantizer

HALF = (torch.float16, torch.bfloat16)


def quantize_upcast(quantizer: Quantizer, latents: Tensor) -> Quantized:
    """Quantize in float32 or better, under any autocast and whatever the precision of the quantizer's parameters.

    The latents of a quantizer in half precision are returned in its precision.
    """
    exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
    # bf16 distances pick other codes.
    with torch.autocast(latents.device.type, enabled=False):
        rounded = _half_tensors(quantizer)
        if not rounded:
            return quantizer(exact)
        assert isinstance(quantizer, nn.Module)
        converted = {name: each.to(exact.dtype) for name, each in rounded.items()}
        quantized: Quantized = torch.func.functional_call(quantizer, converted, (exact,))
    return replace(quantized, latents=quantized.latents.to(latents.dtype))


def lookup_upcast(quantizer: Quantizer, indices: Tensor) -> Tensor:
    """Look codes up as `quantize_upcast` does, so that both round once, to the precision of the quantizer."""
    rounded = _half_tensors(quantizer)
    if not rounded:
        return quantizer.lookup(indices)
    converted = {f"quantizer.{name}": each.float() for name, each in rounded.items()}
    with torch.autocast(indices.device.type, enabled=False):
        latents: Tensor = torch.func.functional_call(_Lookup(quantizer), converted, (indices,))
    return latents.to(next(iter(rounded.values())).dtype)


class _Lookup(nn.Module):
    """`lookup` as a forward pass, which `functional_call` takes."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, indices: Tensor) -> Tensor:
        return self.quantizer.lookup(indices)


def _half_tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    """Parameters and buffers in half precision."""
    if not isinstance(quantizer, nn.Module):
        return {}
    tensors = [*quantizer.named_parameters(), *quantizer.named_buffers()]
    return {name: each for name, each in tensors if each.dtype in HALF}
