"""Numbers of a run with the protocol that each was measured by: those of its training, and those of evaluations."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.pipelines.checkpoint import Checkpoint
from vqf.pipelines.common import chosen
from vqf.registry import components
from vqf.settings import written

PREFIX = "validation/"
NAMES = {"stage1": "training", "stage2": "training-prior"}  # of the protocols of a training's own looks
SAYS_NOTHING = {"log_vocabulary"}  # a fact of the model, in which no run is better than another

Found = Iterator[tuple[str, "Number"]]  # metric, number


@dataclass(frozen=True)
class Number:
    """One measured number, with every line of the protocol that it was measured by."""

    value: float
    lines: Mapping[str, str]
    step: int  # of the weights
    evaluated: bool = False  # by pipeline=evaluate, and not in training
    interval: tuple[float, float] | None = None  # 95 %
    floor: float | None = None  # the same of real pictures against real ones


def looked(checkpoint: Checkpoint, lines: Iterable[Mapping[str, Any]]) -> Found:
    """Yield what a training measured when it last looked at held-out pictures, up to a checkpoint.

    Args:
        checkpoint: Of the run.
        lines: Of its `metrics.jsonl`.
    """
    seen = [line for line in lines if line["step"] <= checkpoint.step and any(key.startswith(PREFIX) for key in line)]
    last = [line for line in seen if line["step"] == seen[-1]["step"]]
    values = {key.removeprefix(PREFIX): value for line in last for key, value in line.items() if key.startswith(PREFIX)}
    protocol = _protocol_of_looks(checkpoint)
    for key, value in values.items():
        if is_number(value) and key not in SAYS_NOTHING:
            yield key, Number(value, protocol | _about(key, checkpoint), last[0]["step"])


def evaluated(folder: Path, checkpoints: Iterable[Checkpoint]) -> Found:
    """Yield what `pipeline=evaluate` measured of a run.

    Args:
        folder: The run's.
        checkpoints: Of the run, which know the tokenizer of its codes.
    """
    by_kind = {each.kind: each for each in checkpoints}
    for path in sorted(folder.glob("evaluations/*/metrics.json")):
        content = read_json(path)
        protocol = {key: _text(value) for key, value in _part(content, "protocol").items() if key != "hash"}
        origin, settings = _part(content, "checkpoint"), _part(content, "settings")
        intervals, floors = _part(content, "intervals"), _part(content, "floors")
        for key, value in _part(content, "values").items():
            own = {f"metric.{name}": _text(each) for name, each in (settings.get(key) or {}).items()}
            lines = protocol | own | _about(key, by_kind.get(str(origin.get("kind"))))
            if is_number(value) and key not in SAYS_NOTHING:
                floor = floors.get(key)
                yield key, Number(value, lines, int(origin.get("step", 0)), True, _span(intervals.get(key)), floor)


def is_number(value: Any) -> bool:
    """Tell whether a value of a JSON file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none, or no whole one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _protocol_of_looks(checkpoint: Checkpoint) -> dict[str, str]:
    config, state = checkpoint.config, checkpoint.state
    lines = {
        "name": NAMES.get(checkpoint.kind, checkpoint.kind),
        "data": OmegaConf.select(config, "data.name"),
        "pictures": (state.get("held_out") or state.get("data") or "unknown")[:12],
        "subject": config.get("subject", "image"),
        "image_size": " x ".join(map(str, state.get("image_size", []))),
        "count": OmegaConf.select(config, "evaluate.count") or "all",
    }
    return {key: _text(value) for key, value in lines.items()} | _metric_options(config)


def _about(key: str, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return what else a number depends on: nats per token are those of the codes of one tokenizer."""
    known = checkpoint.state.get("tokenizer") if checkpoint is not None and key == "nats_per_token" else None
    return {"tokenizer": known[:12]} if known else {}


def _metric_options(config: DictConfig) -> dict[str, str]:
    """Return the options of metrics that are not what they are by default."""
    usual = {each.name: {key: value.default for key, value in each.options.items()} for each in components("metric")}
    lines: dict[str, str] = {}
    for place, node in chosen(config, "metric").items():
        content: dict[str, Any] = OmegaConf.to_container(node)  # type: ignore[assignment]
        known = usual.get(content.pop("name"), {})
        lines |= {f"metric.{place}.{key}": _text(value) for key, value in content.items() if value != known.get(key)}
    return lines


def _span(interval: Any) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval and None not in interval else None


def _part(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, list | dict) else written(value)
