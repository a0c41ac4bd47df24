"""The report of a run: one page that holds everything and needs nothing, for a browser, a printer or a mail."""

import base64
import hashlib
import importlib.metadata
import importlib.resources
import logging
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.loggers.curves import curve
from vqf.loggers.records import Part, command, parts, pictures, read_json, read_text
from vqf.registry import register

PACKAGES = ("vqf", "torch", "hydra-core", "timm")

# What a number means, for readers who did not choose it.
MEANINGS = {
    "psnr": "peak signal-to-noise ratio, dB, mean over pictures; higher is better",
    "psnr_masked": "PSNR of what is drawn, without the empty background; higher is better",
    "psnr_pooled": "PSNR of all pictures taken together; higher is better",
    "ssim": "structural similarity, at most 1; higher is better",
    "perceptual": "perceptual distance (EfficientNet-Lite, LPIPS form, uncalibrated); lower is better",
    "lpips": "LPIPS v0.1 on VGG16; lower is better",
    "usage": "share of the codebook that held-out pictures use",
    "perplexity": "codes that, used evenly, would carry as much",
    "dead": "codes that no held-out picture uses",
    "nats_per_token": "stage 2, negative log-likelihood of held-out codes; lower is better",
    "log_vocabulary": "the same of codes drawn blindly, ln of the vocabulary",
}
CAPTIONS = {
    "reconstructions": "Held-out pictures. Each pair: the original, then what came back through the codes.",
    "samples": "Drawn by the prior, code by code.",
}


@register("logger", "report")
class Report:
    """Writes `report.html` into the run's folder when the run ends."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Read from disk at the end."""

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Read from disk at the end."""

    def close(self) -> None:
        """Write the page. A page that fails is reported, and takes no finished run down with it."""
        log = logging.getLogger("vqf")
        try:
            log.info("wrote %s", write_report(self.run_dir))
        except Exception:
            log.warning("the report could not be written", exc_info=True)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from whatever a run has on disk: numbers, pictures, config, command."""
    from jinja2 import Environment, StrictUndefined

    source = (importlib.resources.files("vqf.loggers") / "report.html.j2").read_text()
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    page = template.render(collect(run_dir))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def collect(run_dir: Path) -> dict[str, Any]:
    """Gather what the page shows."""
    found, summary = parts(run_dir), read_json(run_dir / "summary.json")
    seconds = summary.get("wall_seconds") or sum(part.seconds for part in found)
    return {
        "title": run_dir.absolute().name,
        "place": run_dir.absolute().parent.name,
        "tables": _tables(run_dir, found),
        "pictures": _pictures(run_dir, found),
        "curves": [(_heading(part), _curves(part)) for part in found],
        "command": command(run_dir, summary),
        "config": read_text(run_dir / ".hydra" / "config.yaml"),
        "duration": duration(seconds),
        "versions": summary.get("versions") or versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run rests on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def duration(seconds: Any) -> str:
    """Word a time; empty where there is none."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds <= 0:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def number(value: Any) -> str:
    """Word a number with four digits that matter."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def _tables(run_dir: Path, found: list[Part]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return titled rows (name, number, meaning): the final table, or the last look at held-out data."""
    final = {title: row for title, row in read_json(run_dir / "metrics.json").items() if isinstance(row, dict)}
    last = {
        f"{_heading(part)}, step {number(points[-1][0])}": {key: each[-1][1] for key, each in part.validation.items()}
        for part in found
        if (points := next(iter(part.validation.values()), None))
    }
    return [
        (title, [(key, number(value), MEANINGS.get(key, "")) for key, value in row.items()])
        for title, row in (final or last).items()
    ]


def _pictures(run_dir: Path, found: list[Part]) -> list[dict[str, str]]:
    """Return the newest pictures of the run and its stages, each picture once."""
    shown: dict[str, dict[str, str]] = {}
    folders = {run_dir: "", **{part.folder: _heading(part) for part in found if part.name}}
    for folder, heading in folders.items():
        for name, path in pictures(folder).items():
            content = path.read_bytes()
            title = name.replace("_", " ").capitalize()
            picture = {
                "title": f"{title} · {heading}" if heading else title,
                "caption": CAPTIONS.get(name, ""),
                "uri": f"data:image/png;base64,{base64.b64encode(content).decode()}",
            }
            shown.setdefault(hashlib.sha256(content).hexdigest(), picture)
    return list(shown.values())


def _curves(part: Part) -> list[tuple[str, str]]:
    """Draw every key that was measured more than once."""
    drawn = {key: part.series(key) for key in part.keys}
    return [(key, curve(series)) for key, series in drawn.items() if max(map(len, series.values())) > 1]


def _heading(part: Part) -> str:
    names = {"": "Training", "stage1": "Stage 1, the tokenizer", "stage2": "Stage 2, the prior"}
    return names.get(part.name, part.name)
