"""What each shortcut of `sampler=sliding_window` saves: `python benchmarks/sliding_window.py`.

An untrained GPT draws one picture of each grid, window by window: first as the paper's notebook does, the whole window
for every token, then with each shortcut. A step is a wait for the prior; `positions` are the tokens that run through
its blocks; `prefix` stands for the option `prefix_only`. The last column compares the tokens with those of the plain
way: they are the same numbers added in another order, so in float32 a draw may, rarely, fall on the other side of a
boundary.
"""

import argparse
import time

import torch
from torch import Tensor

from vqf import terminal
from vqf.registry import build
from vqf.transformers.sliding import waves

GRIDS = ((64, 64), (42, 64))
NONE = {"prefix_only": False, "cache": False, "wavefront": False}
WAYS = {
    "plain": NONE,
    "prefix": {**NONE, "prefix_only": True},
    "prefix, cache": {**NONE, "prefix_only": True, "cache": True},
    "wavefront": {**NONE, "wavefront": True},
    "prefix, wavefront": {**NONE, "prefix_only": True, "wavefront": True},
    "all three": {},
}


def make_prior(layers: int, dim: int, window: int, device: str) -> torch.nn.Module:
    """Build a GPT over 1024 codes whose logits are not all alike."""
    torch.manual_seed(0)
    options = {"name": "gpt", "layers": layers, "heads": 8, "dim": dim}
    prior = build("prior", options, vocab_size=1024, length=window**2, prefix_vocab=1, prefix_length=1)
    torch.nn.init.normal_(prior.head.weight, std=0.2)
    return prior.to(device).eval()


def measure(
    prior: torch.nn.Module, grid: tuple[int, int], window: int, batch: int, way: dict
) -> tuple[float, int, Tensor]:
    """Return the seconds, the positions that went through the prior, and the tokens."""
    positions = 0

    def count(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal positions
        positions += output.shape[0] * output.shape[1]

    device = next(prior.parameters()).device
    sampler = build("sampler", {"name": "sliding_window", "window": window, **way})
    prefix = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    hook = prior.blocks[0].register_forward_hook(count)  # type: ignore[index]
    began = time.perf_counter()
    tokens = sampler(prior, prefix, grid, seed=0).cpu()  # waits for the device
    seconds = time.perf_counter() - began
    hook.remove()
    return seconds, positions // batch, tokens


def main() -> None:
    """Print a table for each grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    prior = make_prior(args.layers, args.dim, args.window, args.device)
    measure(prior, (args.window, args.window + 4), args.window, args.batch, {})  # warm up
    rows = []
    for grid in GRIDS:
        plain: tuple[float, Tensor] | None = None
        for name, way in WAYS.items():
            seconds, positions, tokens = measure(prior, grid, args.window, args.batch, way)
            plain = plain or (seconds, tokens)
            steps = len(list(waves(grid, args.window))) if way.get("wavefront", True) else grid[0] * grid[1]
            same = (tokens == plain[1]).double().mean()
            rows.append((
                f"{grid[0]} x {grid[1]} {name}", f"{steps:,}", f"{positions:,}", f"{seconds:.2f}",
                f"{plain[0] / seconds:.1f}", f"{same:.1%}",
            ))  # fmt: skip
    title = (
        f"{args.layers} layers of {args.dim}, window {args.window} x {args.window}, batch {args.batch}, {args.device}"
    )
    terminal.table(title, ("grid and way", "steps", "positions", "seconds", "faster", "same"), rows)


if __name__ == "__main__":
    main()
