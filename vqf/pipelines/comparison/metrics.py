"""Metrics of a run, each with its protocol."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vqf.config.access import group_nodes
from vqf.errors import UserError
from vqf.evaluation.likelihood import PRIOR_DIRECTIONS
from vqf.evaluation.protocols import stable_hash
from vqf.evaluation.reconstruction import metric_directions
from vqf.evaluation.result import manifest_sha256
from vqf.options.typed_nodes import to_cli
from vqf.protocols import VALIDATION_PREFIX
from vqf.registry import components
from vqf.run_files.records import evaluation_files, read_record
from vqf.run_files.shapes import METRICS, is_number
from vqf.runs.checkpoint import Checkpoint

PROTOCOL_NAMES = {"stage1": "training", "stage2": "training-prior"}  # of validations during training
NOT_COMPARED = {"uniform_nats"}  # depends on the model alone, so no run is better than another

MetricValues = Iterator[tuple[str, "MetricValue"]]  # by metric


@dataclass(frozen=True)
class MetricValue:
    """One measured value, with all lines of its protocol."""

    value: float
    protocol: Mapping[str, str]
    step: int  # of the weights
    from_evaluation: bool = False  # by pipeline=evaluate; else by training
    interval: tuple[float, float] | None = None  # 95 % confidence interval
    floor: float | None = None  # the same metric of real images against real images
    higher_is_better: bool | None = None  # None if the metric does not say
    protocol_hash: str = ""  # as in the file of the evaluation


def training_metrics(checkpoint: Checkpoint, records: Iterable[Mapping[str, Any]]) -> MetricValues:
    """Yield the metrics of the last validation up to a checkpoint."""
    step, values = 0, dict[str, Any]()
    for record in records:
        found = {key: value for key, value in record.items() if key.startswith(VALIDATION_PREFIX)}
        if found and record["step"] <= checkpoint.step:
            values = found if record["step"] != step else values | found
            step = record["step"]
    protocol, directions = _training_protocol(checkpoint), _metric_directions(checkpoint.config)
    for prefixed, value in values.items():
        key = prefixed.removeprefix(VALIDATION_PREFIX)
        if is_number(value) and key not in NOT_COMPARED:
            lines = protocol | _metric_lines(key, checkpoint)
            yield key, MetricValue(value, lines, step, higher_is_better=directions.get(key))


def evaluation_metrics(folder: Path, checkpoints: Iterable[Checkpoint], same_step: bool) -> MetricValues:
    """Yield, for each metric and protocol, the value by `pipeline=evaluate` of the newest weights.

    Args:
        checkpoints: One for each stage; values of later weights, or of others at the same step, are left out.
        same_step: Leave out values of earlier weights, too.
    """
    by_kind = {checkpoint.kind: checkpoint for checkpoint in checkpoints}
    newest: dict[tuple[str, str], MetricValue] = {}
    for path in evaluation_files(folder):
        content = read_record(path, METRICS)
        info = content.get("checkpoint", {})
        checkpoint = by_kind.get(str(info.get("kind")))
        if _matches_checkpoint(info, checkpoint, same_step):
            for key, metric in _metric_values(content, checkpoint):
                column = key, stable_hash(metric.protocol)
                if column not in newest or metric.step >= newest[column].step:
                    newest[column] = metric
    return ((key, metric) for (key, _), metric in newest.items())


def _matches_checkpoint(checkpoint_info: Mapping[str, Any], checkpoint: Checkpoint | None, same_step: bool) -> bool:
    """Tell whether the evaluated weights are a checkpoint's, or, unless `same_step`, earlier ones."""
    step = checkpoint_info.get("step")
    if checkpoint is None or step == checkpoint.step:
        return checkpoint is None or checkpoint_info.get("sha256") == manifest_sha256(checkpoint)
    return not same_step and isinstance(step, int) and step < checkpoint.step


def _metric_values(content: Mapping[str, Any], checkpoint: Checkpoint | None) -> MetricValues:
    protocol, intervals, floors, settings, directions = (
        content.get(key, {}) for key in ("protocol", "intervals", "floors", "settings", "higher_is_better")
    )
    lines = {key: _to_text(value) for key, value in protocol.items() if key != "hash"}
    for key, value in content.get("values", {}).items():
        if is_number(value) and key not in NOT_COMPARED:
            options = {f"metric.{name}": _to_text(option) for name, option in settings.get(key, {}).items()}
            yield (
                key,
                MetricValue(
                    value,
                    lines | options | _metric_lines(key, checkpoint),
                    step=content.get("checkpoint", {}).get("step", 0),
                    from_evaluation=True,
                    interval=_interval(intervals.get(key)),
                    floor=floors.get(key),
                    higher_is_better=directions.get(key),
                    protocol_hash=str(protocol.get("hash", "")),
                ),
            )


def _metric_directions(config: DictConfig) -> Mapping[str, bool]:
    try:
        return metric_directions(config) | PRIOR_DIRECTIONS
    except UserError:
        return PRIOR_DIRECTIONS


def _training_protocol(checkpoint: Checkpoint) -> dict[str, str]:
    config, state = checkpoint.config, checkpoint.state
    lines = {
        "name": PROTOCOL_NAMES.get(checkpoint.kind, checkpoint.kind),
        "data": OmegaConf.select(config, "data.name"),
        "images": (state.get("validation_fingerprint") or state.get("data") or "unknown")[:12],
        "target": config.get("target", "image"),
        "image_size": " x ".join(map(str, state.get("image_size", []))),
        "count": OmegaConf.select(config, "evaluate.count") or "all",
    }
    return {key: _to_text(value) for key, value in lines.items()} | _metric_options(config)


def _metric_lines(key: str, checkpoint: Checkpoint | None) -> dict[str, str]:
    tokenizer = checkpoint.state.get("tokenizer") if checkpoint is not None and key == "nats_per_token" else None
    return {"tokenizer": tokenizer[:12]} if tokenizer else {}


def _metric_options(config: DictConfig) -> dict[str, str]:
    defaults = {
        component.name: {key: option.default for key, option in component.options.items()}
        for component in components("metric")
    }
    lines: dict[str, str] = {}
    for name, node in group_nodes(config, "metric").items():
        options = cast(dict[str, Any], OmegaConf.to_container(node))
        default = defaults.get(options.pop("name"), {})
        lines |= {
            f"metric.{name}.{key}": _to_text(value) for key, value in options.items() if value != default.get(key)
        }
    return lines


def _interval(interval: Any) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval and None not in interval else None


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, list | dict) else to_cli(value)
