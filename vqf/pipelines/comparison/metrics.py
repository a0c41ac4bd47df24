"""Numbers of a run with the protocol that each was measured by: those of its training, and those of evaluations."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.config.access import group_nodes
from vqf.config.settings import to_cli
from vqf.errors import UserError
from vqf.evaluation.protocols import stable_hash
from vqf.evaluation.reconstruction import PRIOR_METRIC_DIRECTIONS, metric_directions
from vqf.evaluation.result import manifest_sha256
from vqf.protocols import VALIDATION_PREFIX
from vqf.registry import components
from vqf.runs.checkpoint import Checkpoint

PROTOCOL_NAMES = {"stage1": "training", "stage2": "training-prior"}  # of the protocols of a training's own looks
NOT_COMPARED = {"uniform_nats"}  # a fact of the model, in which no run is better than another

MetricValues = Iterator[tuple[str, "MetricValue"]]  # metric, number


@dataclass(frozen=True)
class MetricValue:
    """One measured number, with every line of the protocol that it was measured by."""

    value: float
    protocol: Mapping[str, str]
    step: int  # of the weights
    from_evaluation: bool = False  # by pipeline=evaluate, and not in training
    interval: tuple[float, float] | None = None  # 95 %
    floor: float | None = None  # the same of real images against real ones
    higher_is_better: bool | None = None  # None where its metric does not say
    protocol_hash: str = ""  # of the protocol, as its file says


def training_metrics(checkpoint: Checkpoint, records: Iterable[Mapping[str, Any]]) -> MetricValues:
    """Yield what a training measured when it last looked at held-out images, up to a checkpoint.

    Args:
        checkpoint: Of the run.
        records: Of its `metrics.jsonl`.
    """
    seen = [
        line
        for line in records
        if line["step"] <= checkpoint.step and any(key.startswith(VALIDATION_PREFIX) for key in line)
    ]
    last = [line for line in seen if line["step"] == seen[-1]["step"]]
    values = {
        key.removeprefix(VALIDATION_PREFIX): value
        for line in last
        for key, value in line.items()
        if key.startswith(VALIDATION_PREFIX)
    }
    protocol, senses = _training_protocol(checkpoint), _metric_directions(checkpoint.config)
    for key, value in values.items():
        if is_number(value) and key not in NOT_COMPARED:
            lines_of_it = protocol | _metric_lines(key, checkpoint)
            yield key, MetricValue(value, lines_of_it, last[0]["step"], higher_is_better=senses.get(key))


def evaluation_metrics(folder: Path, checkpoints: Iterable[Checkpoint], same_step: bool) -> MetricValues:
    """Yield what `pipeline=evaluate` measured of a run: of each number by each protocol that of the newest weights.

    Args:
        folder: The run's.
        checkpoints: Of the run. What was measured of later weights, or of others at the same step, does not count.
        same_step: Nor does what was measured of earlier ones.
    """
    by_kind = {each.kind: each for each in checkpoints}
    newest: dict[tuple[str, str], MetricValue] = {}
    for path in sorted(folder.glob("evaluations/*/*/metrics.json")):
        content = read_json(path)
        origin = _section(content, "checkpoint")
        checkpoint = by_kind.get(str(origin.get("kind")))
        if _matches_checkpoint(origin, checkpoint, same_step):
            for key, number in _metric_values(content, checkpoint):
                place = key, stable_hash(number.protocol)
                if place not in newest or number.step >= newest[place].step:
                    newest[place] = number
    return ((key, number) for (key, _), number in newest.items())


def _matches_checkpoint(checkpoint_info: Mapping[str, Any], checkpoint: Checkpoint | None, same_step: bool) -> bool:
    """Tell whether weights that were measured are a checkpoint, or, unless `same_step`, came before it."""
    step = checkpoint_info.get("step")
    if checkpoint is None or step == checkpoint.step:
        return checkpoint is None or checkpoint_info.get("sha256") == manifest_sha256(checkpoint)
    return not same_step and isinstance(step, int) and step < checkpoint.step


def _metric_values(content: Mapping[str, Any], checkpoint: Checkpoint | None) -> MetricValues:
    """Yield the numbers of a file of `pipeline=evaluate`."""
    protocol = {key: _to_text(value) for key, value in _section(content, "protocol").items() if key != "hash"}
    beside = {key: _section(content, key) for key in ("settings", "intervals", "floors", "higher_is_better")}
    about = str(_section(content, "protocol").get("hash", "")), int(_section(content, "checkpoint").get("step", 0))
    for key, value in _section(content, "values").items():
        if is_number(value) and key not in NOT_COMPARED:
            own = {f"metric.{name}": _to_text(each) for name, each in (beside["settings"].get(key) or {}).items()}
            yield (
                key,
                MetricValue(
                    value,
                    protocol | own | _metric_lines(key, checkpoint),
                    about[1],
                    True,
                    _interval(beside["intervals"].get(key)),
                    beside["floors"].get(key),
                    beside["higher_is_better"].get(key),
                    about[0],
                ),
            )


def _metric_directions(config: DictConfig) -> Mapping[str, bool]:
    """Return of the numbers of a training whether more is better; nothing of a metric that is not registered here."""
    try:
        return metric_directions(config) | PRIOR_METRIC_DIRECTIONS
    except UserError:
        return PRIOR_METRIC_DIRECTIONS


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
    """Return what else a number depends on: nats per token are those of the codes of one tokenizer."""
    known = checkpoint.state.get("tokenizer") if checkpoint is not None and key == "nats_per_token" else None
    return {"tokenizer": known[:12]} if known else {}


def _metric_options(config: DictConfig) -> dict[str, str]:
    """Return the options of metrics that are not what they are by default."""
    usual = {each.name: {key: value.default for key, value in each.options.items()} for each in components("metric")}
    lines: dict[str, str] = {}
    for place, node in group_nodes(config, "metric").items():
        content: dict[str, Any] = OmegaConf.to_container(node)  # type: ignore[assignment]
        known = usual.get(content.pop("name"), {})
        lines |= {f"metric.{place}.{key}": _to_text(value) for key, value in content.items() if value != known.get(key)}
    return lines


def _interval(interval: Any) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval and None not in interval else None


def _section(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, list | dict) else to_cli(value)
