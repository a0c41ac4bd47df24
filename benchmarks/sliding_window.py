"""Speed of the optimizations of `sampler=sliding_window`: `python benchmarks/sliding_window.py`.

An untrained GPT samples one image per grid: first by reading, for every token, its window from the start to the token,
then with each optimization. A step is a pass through the prior; `tokens` are the positions that run through its blocks,
condition included. The last column compares the sampled tokens with the plain ones: another order of summation can,
rarely, move a draw across a boundary in float32.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqf import terminal
from vqf.registry import build
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import PrefixSpec

GRIDS = ((64, 64), (42, 64))
NONE = {"cache": False, "wavefront": False}
WAYS = {
    "plain": NONE,
    "cache": {**NONE, "cache": True},
    "wavefront": {**NONE, "wavefront": True},
    "cache, wavefront": {},
}
CODES, STRIDE = 1024, 16


@dataclass
class Measured:
    """What drawing one grid took."""

    seconds: float
    processor: float  # seconds of all its threads: what a machine with other work on it does not change
    steps: int
    positions: int  # for each image
    tokens: Tensor


def layout_of(grid: tuple[int, int]) -> TokenLayout:
    """Return the layout of a grid of codes."""
    return TokenLayout((grid,), (CODES,), STRIDE)


def make_prior(args: argparse.Namespace) -> torch.nn.Module:
    """Build a GPT over 1024 codes whose logits are not all alike."""
    torch.manual_seed(0)
    options = {"name": "gpt", "layers": args.layers, "heads": args.heads, "dim": args.dim}
    prefix = PrefixSpec(CODES, args.window**2 if args.map else 1)
    prior = build("prior", options, layout=layout_of((args.window, args.window)), prefix=prefix)
    torch.nn.init.normal_(prior.head.weight, std=0.2)
    return prior.to(args.device).eval()


def measure(prior: torch.nn.Module, grid: tuple[int, int], args: argparse.Namespace, way: dict) -> Measured:
    """Draw a grid."""
    passes: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        passes.append(output.shape[0] * output.shape[1])

    sampler = build("sampler", {"name": "sliding_window", "window": args.window, **way})
    shape = (args.batch, *grid) if args.map else (args.batch, 1)
    prefix = torch.randint(CODES, shape, generator=torch.Generator().manual_seed(1)).to(args.device)
    hook = prior.blocks[0].register_forward_hook(count)  # type: ignore[index]
    began, busy = time.perf_counter(), time.process_time()
    tokens = sampler(prior, prefix, layout_of(grid), seed=0).cpu()  # waits for the device
    seconds, processor = time.perf_counter() - began, time.process_time() - busy
    hook.remove()
    return Measured(seconds, processor, len(passes), sum(passes) // args.batch, tokens)


def lines(prior: torch.nn.Module, grid: tuple[int, int], args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield what each way of drawing a grid took, against the plain one."""
    plain: Measured | None = None
    for name, way in WAYS.items():
        found = measure(prior, grid, args, way)
        plain = plain or found
        same = (found.tokens == plain.tokens).double().mean()
        faster = f"{plain.seconds / found.seconds:.1f}"
        less = f"{plain.processor / found.processor:.1f}"
        yield (
            f"{grid[0]} x {grid[1]}", name, f"{found.steps:,}", f"{found.positions:,}", f"{found.seconds:.1f}", faster,
            f"{found.processor:.1f}", less, f"{same:.1%}",
        )  # fmt: skip


def main() -> None:
    """Print a table of all grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument(
        "--map", action="store_true", help="behind a token for every code of the window, not behind one"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    prior = make_prior(args)
    measure(prior, (args.window, args.window + 4), args, {})  # warm up
    rows = [row for grid in GRIDS for row in lines(prior, grid, args)]
    condition = "a map" if args.map else "a start token"
    title = (
        f"{args.layers} layers of {args.dim}, window {args.window} x {args.window}, behind {condition}, "
        f"batch {args.batch}, {args.device}"
    )
    terminal.print_table(title, ("grid", "way", "steps", "tokens", "wall s", "faster", "CPU s", "less", "same"), rows)


if __name__ == "__main__":
    main()
