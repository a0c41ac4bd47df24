"""Numbers of a run with the protocol that each was measured by: those of its training, and those of evaluations."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.config.access import chosen
from vqf.config.settings import written
from vqf.errors import UserError
from vqf.evaluation.protocols import digest
from vqf.evaluation.reconstruction import NUMBERS_OF_PRIORS, senses
from vqf.evaluation.result import mark
from vqf.registry import components
from vqf.runs.checkpoint import Checkpoint

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
    higher_is_better: bool | None = None  # None where its metric does not say
    hash: str = ""  # of the protocol, as its file says


def looked(checkpoint: Checkpoint, lines: Iterable[Mapping[str, Any]]) -> Found:
    """Yield what a training measured when it last looked at held-out pictures, up to a checkpoint.

    Args:
        checkpoint: Of the run.
        lines: Of its `metrics.jsonl`.
    """
    seen = [line for line in lines if line["step"] <= checkpoint.step and any(key.startswith(PREFIX) for key in line)]
    last = [line for line in seen if line["step"] == seen[-1]["step"]]
    values = {key.removeprefix(PREFIX): value for line in last for key, value in line.items() if key.startswith(PREFIX)}
    protocol, senses = _protocol_of_looks(checkpoint), _senses(checkpoint.config)
    for key, value in values.items():
        if is_number(value) and key not in SAYS_NOTHING:
            lines_of_it = protocol | _about(key, checkpoint)
            yield key, Number(value, lines_of_it, last[0]["step"], higher_is_better=senses.get(key))


def evaluated(folder: Path, checkpoints: Iterable[Checkpoint], exact: bool) -> Found:
    """Yield what `pipeline=evaluate` measured of a run: of each number by each protocol that of the newest weights.

    Args:
        folder: The run's.
        checkpoints: Of the run. What was measured of later weights, or of others at the same step, does not count.
        exact: Nor does what was measured of earlier ones.
    """
    by_kind = {each.kind: each for each in checkpoints}
    newest: dict[tuple[str, str], Number] = {}
    for path in sorted(folder.glob("evaluations/*/*/metrics.json")):
        content = read_json(path)
        origin = _part(content, "checkpoint")
        checkpoint = by_kind.get(str(origin.get("kind")))
        if _counts(origin, checkpoint, exact):
            for key, number in _numbers(content, checkpoint):
                place = key, digest(number.lines)
                if place not in newest or number.step >= newest[place].step:
                    newest[place] = number
    return ((key, number) for (key, _), number in newest.items())


def _counts(origin: Mapping[str, Any], checkpoint: Checkpoint | None, exact: bool) -> bool:
    """Tell whether weights that were measured are a checkpoint, or, unless `exact`, came before it."""
    step = origin.get("step")
    if checkpoint is None or step == checkpoint.step:
        return checkpoint is None or origin.get("sha256") == mark(checkpoint)
    return not exact and isinstance(step, int) and step < checkpoint.step


def _numbers(content: Mapping[str, Any], checkpoint: Checkpoint | None) -> Found:
    """Yield the numbers of a file of `pipeline=evaluate`."""
    protocol = {key: _text(value) for key, value in _part(content, "protocol").items() if key != "hash"}
    beside = {key: _part(content, key) for key in ("settings", "intervals", "floors", "higher_is_better")}
    about = str(_part(content, "protocol").get("hash", "")), int(_part(content, "checkpoint").get("step", 0))
    for key, value in _part(content, "values").items():
        if is_number(value) and key not in SAYS_NOTHING:
            own = {f"metric.{name}": _text(each) for name, each in (beside["settings"].get(key) or {}).items()}
            yield (
                key,
                Number(
                    value,
                    protocol | own | _about(key, checkpoint),
                    about[1],
                    True,
                    _span(beside["intervals"].get(key)),
                    beside["floors"].get(key),
                    beside["higher_is_better"].get(key),
                    about[0],
                ),
            )


def _senses(config: DictConfig) -> Mapping[str, bool]:
    """Return of the numbers of a training whether more is better; nothing of a metric that is not registered here."""
    try:
        return senses(config) | NUMBERS_OF_PRIORS
    except UserError:
        return NUMBERS_OF_PRIORS


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
