"""Curves as inline SVG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vqf.loggers.report.curve_points import Curve

TEXT_COLOR = "#010203"  # placeholder, replaced by currentColor
COLORS = {"training": "#4c6ef5", "validation": "#f76707"}
SMOOTH_FROM, BINS = 60, 40  # from so many points on, training curves are drawn as means of so many bins


def plot_curves(series: Mapping[str, Curve]) -> str:
    """Plot "training" and "validation" over steps as an SVG element."""

    def draw(axes: Any) -> None:
        for name, curve in series.items():
            _plot(axes, name, curve)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)

    return _figure(draw, repr({name: curve.points for name, curve in series.items()}))


def usage_curve(counts: Sequence[int]) -> str:
    """Plot descending counts of codes as an SVG element."""

    def draw(axes: Any) -> None:
        axes.fill_between(range(len(counts)), counts, step="post", color=COLORS["training"], alpha=0.35, linewidth=0)
        axes.axhline(
            sum(counts) / len(counts), color=COLORS["validation"], linewidth=1.2, linestyle="--", label="uniform"
        )
        axes.set(xlim=(0, len(counts)), ylim=(0, None), xlabel="codes, by descending count", ylabel="count")
        axes.legend(frameon=False, fontsize=8)

    return _figure(draw, repr(counts))


def _figure(draw: Callable[[Any], None], salt: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT_COLOR
    )
    style |= {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}
    with rc_context(style):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=TEXT_COLOR, alpha=0.12, linewidth=0.6)
        svg = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=empty)
    return _inline(svg.getvalue())


def _plot(axes: Any, name: str, curve: Curve) -> None:
    color = COLORS[name]
    if name == "training" and len(curve) >= SMOOTH_FROM:
        axes.plot(*zip(*curve.points, strict=True), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*curve.means(BINS), strict=True), color=color, linewidth=1.6, label=name)
    else:
        axes.plot(*zip(*curve.points, strict=True), color=color, linewidth=1.6, label=name, marker="o", markersize=3)


def _inline(svg: str) -> str:
    """Strip what the page decides: size, color, font."""
    svg = svg[svg.index("<svg") :].replace(TEXT_COLOR, "currentColor")
    for unwanted in (
        r"<metadata>.*?</metadata>",
        r'(?<=<g) id="[^"]*"',  # equal in every figure, so not unique on the page; nothing refers to them
        r" font-family: [^;]*;",
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    return re.sub(r'^<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg role="img" \1>', svg)
