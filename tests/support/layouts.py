"""Token layouts of tests."""

from vqf.tokens.layout import TokenLayout


def raster(grid: tuple[int, int], vocab_size: int, stride: int = 8) -> TokenLayout:
    """One grid of cells, one codebook."""
    return TokenLayout((grid,), (vocab_size,), stride)
