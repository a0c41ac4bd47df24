"""Facts about a run for its page."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vqf.loggers.report.run_parts import newest_checkpoint
from vqf.run_files.records import read_config_record
from vqf.run_files.shapes import is_finite
from vqf.terminal import format_bytes, format_seconds

Facts = list[tuple[str, str]]  # (name, text)

PIPELINE_DESCRIPTIONS = {
    "stage1": "A tokenizer: images into discrete codes, and back.",
    "stage2": "A prior: predicts the next code of an image.",
    "full": "A tokenizer turns images into discrete codes and back; a prior generates such codes.",
    "sample": "New images, drawn by a trained prior.",
    "reconstruct": "Images, encoded and decoded by a trained tokenizer.",
    "complete": "Validation images, completed by a trained prior.",
    "evaluate": "A trained model, evaluated by a protocol.",
}
PIPELINES_ON_RUNS = ("sample", "reconstruct", "complete", "evaluate")  # their own config does not describe the model
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_")  # a run folder named by the time starts so


def load_config(run_dir: Path) -> Mapping[str, Any]:
    """Load the unresolved config; {} if there is none."""
    checkpoint = newest_checkpoint(run_dir) or newest_checkpoint(run_dir / "stage1")
    for path in (run_dir / ".hydra" / "config.yaml", *([checkpoint / "config.yaml"] if checkpoint else [])):
        config = read_config_record(path)
        content = None if config is None else OmegaConf.to_container(config, resolve=False)
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items()}
    return {}


def title(run_dir: Path) -> tuple[str, str]:
    """Return title and subtitle, from the folder's name and its parent's."""
    folder = run_dir.absolute()
    return (folder.parent.name, folder.name) if TIMESTAMP.match(folder.name) else (folder.name, folder.parent.name)


def description(config: Mapping[str, Any]) -> str:
    """Describe the pipeline; "" if unknown."""
    return PIPELINE_DESCRIPTIONS.get(_name(config.get("pipeline")), "")


def cost_line(summary: Mapping[str, Any], seconds: Any) -> str:
    """Describe duration and machine, as in "2 h 5 min on 8 × NVIDIA H200"."""
    duration, machine = _duration(seconds), _machine(summary)
    return " on ".join(filter(None, [duration, machine])) if duration else ""


def facts(config: Mapping[str, Any], summary: Mapping[str, Any], seconds: Any) -> Facts:
    """List the facts that are known."""
    known = [*_model_facts(config), *_cost_facts(summary, seconds)]
    return [(name, text) for name, text in known if text]


def _model_facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    pipeline, run = _name(config.get("pipeline")), config.get("run")
    if run is not None:
        yield "Of the run", str(run)
    if not config or pipeline in PIPELINES_ON_RUNS:
        return
    model = _section(config, "model")
    size = config.get("image_size")
    sides = " × ".join(str(side) for side in (size if isinstance(size, list) else [size, size]))
    yield "Images", f"{_name(config.get('data'))}, {sides} pixels"
    kinds = [kind for kind in ("encoder", "quantizer", "decoder") if model.get(kind)]
    yield "Tokenizer", ", ".join(f"{_name(model[kind])} {kind}" for kind in kinds)
    if pipeline != "stage2":
        gan = " ".join(_name(model[kind]) for kind in ("discriminator", "adversary") if model.get(kind))
        yield "Losses", " + ".join([*_names(model.get("loss")), *([gan] if gan else [])])
    if pipeline != "stage1":
        yield "Prior", " ".join(filter(None, [_name(model.get("prior")), _conditioned_on(model.get("conditioner"))]))
    yield "Steps", _steps(config, pipeline)
    yield "Seed", str(config.get("seed", ""))


def _cost_facts(summary: Mapping[str, Any], seconds: Any) -> Iterator[tuple[str, str]]:
    yield "Time", _duration(seconds)
    yield "Machine", _machine(summary)
    gpus = summary.get("processes", 1) if summary.get("accelerator") else 0
    cost = [_device_hours(summary.get("processor_seconds"), "CPU")]
    if gpus and isinstance(seconds, int | float):
        cost.insert(0, _device_hours(seconds * gpus, "GPU"))
    yield "Cost", ", ".join(filter(None, cost))
    memory = [
        _memory(summary.get("peak_accelerator_bytes"), " on the GPU"),
        _memory(summary.get("peak_memory_bytes")),
    ]
    yield "Peak memory", ", ".join(filter(None, memory))
    yield "Commit", str(summary.get("commit", ""))


def _duration(seconds: Any) -> str:
    return format_seconds(seconds) if is_finite(seconds) and seconds > 0 else ""


def _machine(summary: Mapping[str, Any]) -> str:
    if accelerator := summary.get("accelerator"):
        count = summary.get("processes", 1)
        return f"{count} × {accelerator}" if count > 1 else str(accelerator)
    processor, threads = summary.get("processor"), summary.get("threads")
    if not processor or not isinstance(threads, int):
        return ""
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def _device_hours(seconds: Any, device: str) -> str:
    if not is_finite(seconds) or seconds <= 0:
        return ""
    return f"{seconds / 3600:.3g} {device} hours" if seconds >= 3600 else f"{seconds / 60:.3g} {device} minutes"


def _memory(size: Any, suffix: str = "") -> str:
    return f"{format_bytes(size)}{suffix}" if is_finite(size) and size > 0 else ""


def _steps(config: Mapping[str, Any], pipeline: str) -> str:
    first = _format_steps(config.get("steps"), config.get("batch_size"))
    if pipeline != "full":
        return first
    stage2 = _section(config, "stage2")
    steps, batch_size = stage2.get("steps"), stage2.get("batch_size")
    inherited = {"${steps}": config.get("steps"), "${batch_size}": config.get("batch_size")}  # the config is unresolved
    second = _format_steps(inherited.get(str(steps), steps), inherited.get(str(batch_size), batch_size))
    return f"{first}, then {second}"


def _format_steps(steps: Any, batch_size: Any) -> str:
    return f"{steps:,} of {batch_size} images" if isinstance(steps, int) else ""


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, Mapping) else {}


def _conditioned_on(conditioner: Any) -> str:
    names = [name for name in _names(conditioner) if name != "none"]
    return f"conditioned on {' and '.join(names)}" if names else ""


def _names(node: Any) -> list[str]:
    if not isinstance(node, Mapping):
        return []
    return [_name(node)] if "name" in node else [str(name) for name, child in node.items() if child is not None]


def _name(node: Any) -> str:
    return str(node.get("name", "")) if isinstance(node, Mapping) else ""
