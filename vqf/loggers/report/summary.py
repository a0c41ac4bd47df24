"""What a run was, in a few words: what it learned from, how long, on what, and at what price."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vqf.loggers.report.run_files import newest_checkpoint

Facts = list[tuple[str, str]]

PIPELINE_DESCRIPTIONS = {
    "stage1": "A tokenizer: images into discrete codes, and back.",
    "stage2": "A prior: what comes next in the codes of an image.",
    "full": "A tokenizer turns images into discrete codes and back; a prior learns to draw such codes.",
    "sample": "New images, drawn by a trained prior.",
    "reconstruct": "Images, through the codes of a trained tokenizer and back.",
    "complete": "Held-out images, completed by a trained prior.",
    "evaluate": "A trained model, measured by a protocol.",
}
PIPELINES_ON_RUNS = (
    "sample",
    "reconstruct",
    "complete",
    "evaluate",
)  # on another run, whose model is not in the config
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_")  # how folders begin that are named by the time


def load_config(run_dir: Path) -> Mapping[str, Any]:
    """Return the config that a run was made with, unresolved; {} where there is none."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    checkpoint = newest_checkpoint(run_dir) or newest_checkpoint(run_dir / "stage1")
    for path in (run_dir / ".hydra" / "config.yaml", *([checkpoint / "config.yaml"] if checkpoint else [])):
        try:
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (OSError, ValueError, YAMLError):
            continue
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items()}
    return {}


def title(run_dir: Path) -> tuple[str, str]:
    """Return what the page is called, and the rest of the folder's name."""
    folder = run_dir.absolute()
    return (folder.parent.name, folder.name) if TIMESTAMP.match(folder.name) else (folder.name, folder.parent.name)


def description(config: Mapping[str, Any]) -> str:
    """Say in a sentence what a run is."""
    return PIPELINE_DESCRIPTIONS.get(_name(config.get("pipeline")), "")


def cost_line(summary: Mapping[str, Any], seconds: Any) -> str:
    """Say how long a run took, and where."""
    took, machine = format_seconds(seconds), _machine(summary)
    return " on ".join(filter(None, [took, machine])) if took else ""


def facts(config: Mapping[str, Any], summary: Mapping[str, Any], seconds: Any) -> Facts:
    """Return what is known of a run, with its names."""
    known = [*_model_facts(config), *_cost_facts(summary, seconds)]
    return [(name, words) for name, words in known if words]


def _model_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    pipeline, run = _name(config.get("pipeline")), config.get("run")
    if run is not None:
        yield "Of the run", str(run)
    if not config or pipeline in PIPELINES_ON_RUNS:
        return
    model = config.get("model") or {}
    size = config.get("image_size")
    sides = " × ".join(str(each) for each in (size if isinstance(size, list) else [size, size]))
    yield "Images", f"{_name(config.get('data'))}, {sides} pixels"
    parts = [f"{_name(model.get(part))} {part}" for part in ("encoder", "quantizer", "decoder") if model.get(part)]
    yield "Tokenizer", ", ".join(parts)
    if pipeline != "stage2":
        players = [_name(model.get(part)) for part in ("discriminator", "adversary") if model.get(part)]
        yield "Learns by", " + ".join([*_names(model.get("loss")), *([" ".join(players)] if players else [])])
    if pipeline != "stage1":
        yield "Prior", " ".join(filter(None, [_name(model.get("prior")), _conditioned_on(model.get("conditioner"))]))
    yield "Steps", _steps(config, pipeline)
    yield "Seed", str(config.get("seed", ""))


def _cost_facts(summary: Mapping[str, Any], seconds: Any) -> Iterator[tuple[str, str]]:
    yield "Took", format_seconds(seconds)
    yield "On", _machine(summary)
    devices = summary.get("processes", 1) if summary.get("accelerator") else 0
    price = [_format_hours(summary.get("processor_seconds"), "CPU")]
    if devices and isinstance(seconds, int | float):
        price.insert(0, _format_hours(seconds * devices, "GPU"))
    yield "Cost", ", ".join(filter(None, price))
    memory = [
        _format_memory(summary.get("peak_accelerator_bytes"), " on the GPU"),
        _format_memory(summary.get("peak_memory_bytes")),
    ]
    yield "Peak memory", ", ".join(filter(None, memory))
    yield "Commit", str(summary.get("commit", ""))


def format_seconds(seconds: Any) -> str:
    """Word a time; empty where there is none."""
    if not _is_number(seconds) or seconds <= 0:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _machine(summary: Mapping[str, Any]) -> str:
    if accelerator := summary.get("accelerator"):
        count = summary.get("processes", 1)
        return f"{count} × {accelerator}" if count > 1 else str(accelerator)
    processor, threads = summary.get("processor"), summary.get("threads")
    if not processor or not isinstance(threads, int):
        return ""
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def _format_hours(seconds: Any, device: str) -> str:
    if not _is_number(seconds) or seconds <= 0:
        return ""
    return f"{seconds / 3600:.3g} {device} hours" if seconds >= 3600 else f"{seconds / 60:.3g} {device} minutes"


def _format_memory(size: Any, suffix: str = "") -> str:
    return f"{size / 2**30:.2f} GiB{suffix}" if _is_number(size) and size > 0 else ""


def _steps(config: Mapping[str, Any], pipeline: str) -> str:
    first = _format_steps(config.get("steps"), config.get("batch_size"))
    if pipeline != "full":
        return first
    second = config.get("stage2") or {}
    steps, batch = (second.get(key) for key in ("steps", "batch_size"))
    same = {"${steps}": config.get("steps"), "${batch_size}": config.get("batch_size")}
    return f"{first}, then {_format_steps(same.get(str(steps), steps), same.get(str(batch), batch))}"


def _format_steps(steps: Any, batch: Any) -> str:
    return f"{steps:,} of {batch} images" if isinstance(steps, int) else ""


def _conditioned_on(conditioner: Any) -> str:
    names = [name for name in _names(conditioner) if name != "none"]
    return f"told {' and '.join(names)}" if names else ""


def _names(node: Any) -> list[str]:
    """Return the names of a group of which several are used at once, or of one that is used alone."""
    if not isinstance(node, Mapping):
        return []
    return [_name(node)] if "name" in node else [str(name) for name, each in node.items() if each is not None]


def _name(node: Any) -> str:
    return str(node.get("name", "")) if isinstance(node, Mapping) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
