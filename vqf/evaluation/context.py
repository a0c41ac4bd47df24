"""The context of an evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.access import group_nodes
from vqf.dataloading.splits import SPLITS
from vqf.dataloading.training_target import build_target_data
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.evaluation.evaluation_images import EvaluationImages
from vqf.evaluation.feature_cache import (
    FeatureSets,
    FeatureStatisticsCache,
    ReferenceSet,
    real_vs_real,
)
from vqf.evaluation.preprocessing import crop_split
from vqf.evaluation.protocols import ORIGINALS, preprocessing_lines, stable_hash
from vqf.evaluation.reconstruction import build_metrics
from vqf.evaluation.result import EvaluationResult
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import (
    EvaluationProtocol,
    FeatureSet,
    HasIntervals,
    HasNetwork,
    Metric,
    SetMetric,
    SetMetricResult,
)
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log


class EvaluationContext:
    """Images, metrics and reference of one evaluation.

    Raises:
        UserError: If the data or a metric cannot be built.
    """

    def __init__(
        self,
        config: DictConfig,
        protocol: EvaluationProtocol,
        tokenizer: Tokenizer,
        engine: Engine,
        feature_cache: FeatureStatisticsCache,
    ) -> None:
        self.config, self.protocol, self.tokenizer, self.engine = config.copy(), protocol, tokenizer, engine
        self.feature_cache = feature_cache
        with open_dict(self.config):
            self.config.seed = protocol.seed  # augmentations of the data source depend on it
        metrics = build_metrics(config, tokenizer.layout, engine)
        self.set_metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
        self.batch_metrics: dict[str, Metric] = {
            name: metric for name, metric in metrics.items() if name not in self.set_metrics
        }
        self.feature_networks = {metric.network.digest: metric.network for metric in self.set_metrics.values()}
        self.data = build_target_data(self.config, tokenizer.image_size)

    def images(self, split_name: str, count: int | None = None) -> EvaluationImages:
        """Return images of a split.

        Raises:
            UserError: If there are fewer than two.
        """
        protocol, config, size = self.protocol, self.config, self.tokenizer.image_size
        split = crop_split(self.data.split(split_name), size, protocol.crop, protocol.resize)
        count = min(count or len(split), len(split))
        if count < 2:
            raise UserError(f"data: {count} image for {split_name}; an evaluation needs at least two")
        source_hash = stable_hash(
            {"images": split.fingerprint, "size": size, **preprocessing_lines(protocol.crop, protocol.resize)}
        )
        loading = (config.batch_size, config.workers, self.engine.device, config.worker_timeout)
        return EvaluationImages(split, source_hash, count, protocol.rounding, *loading)

    def warn_if_validation_changed(self, checkpoint: Checkpoint) -> None:
        trained, part = checkpoint.state.get("validation_fingerprint"), "validation"
        if trained and self.protocol.part == part and trained != (current := self.data.split(part).fingerprint):
            message = (
                "the validation images are not those of the training (%s then, %s now): metrics are not comparable "
                "with the training's, and the model may have been trained on some of the images"
            )
            log.warning(message, trained[:8], current[:8])

    def reference(self) -> ReferenceSet | None:
        """Return the reference's features; None for the originals.

        Raises:
            UserError: If it names no split, and no file.
        """
        name = self.protocol.reference
        if name == ORIGINALS:
            return None
        if name in SPLITS:
            return self.feature_cache.from_split(self.images(name), self.feature_networks)
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"protocol.reference={name}: no such file, and not one of {', '.join(SPLITS)}")
        return self.feature_cache.from_npz(path, self.feature_networks, self.config.batch_size, self.engine.device)

    def result_lines(self, images_hash: str, count: int, reference: ReferenceSet) -> dict[str, Any]:
        """Return the lines of the protocol for the result file."""
        protocol = self.protocol
        measured = {
            "images": images_hash,
            "count": count,
            "image_size": " x ".join(map(str, self.tokenizer.image_size)),
            **preprocessing_lines(protocol.crop, protocol.resize),
            "reference_images": reference.digest,
            "reference_count": reference.count,
        }
        return {**self.protocol_lines(), **measured}

    def protocol_lines(self) -> dict[str, Any]:
        protocol, config = self.protocol, self.config
        lines = {"name": config.protocol.name, "task": protocol.task, "data": config.data.name}
        lines |= {"target": config.target, "precision": config.precision}
        lines |= vars(protocol)
        if lines["reference"] not in (ORIGINALS, *SPLITS):
            lines["reference"] = Path(protocol.reference).name  # results must not depend on where the file lies
        return lines

    def add_set_metrics(
        self, result: EvaluationResult, reference: ReferenceSet, generated: FeatureSets, count: int
    ) -> None:
        """Add set metrics and their floors, real against real images."""
        pairs = {
            key: real_vs_real(features, count, self.protocol.seed) for key, features in reference.feature_sets.items()
        }
        for name, metric in self.set_metrics.items():
            key = metric.network.digest
            compared = metric.compare(reference.feature_sets[key], generated[key])
            prefix = metric.reconstruction_prefix if self.protocol.task == "reconstruction" else ""
            result.add(metric, compared, self.metric_settings(name, metric), prefix)
            result.floors |= {f"{prefix}{name}": value for name, value in _real_vs_real(metric, pairs[key]).items()}

    def add_metrics(self, result: EvaluationResult, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            intervals = metric.intervals() if isinstance(metric, HasIntervals) else {}
            result.add(metric, SetMetricResult(metric.compute(), intervals), self.metric_settings(name, metric))

    def metric_settings(self, name: str, metric: Any) -> dict[str, Any]:
        node = OmegaConf.to_container(group_nodes(self.config, "metric")[name], resolve=True)
        assert isinstance(node, dict)
        options = {str(key): value for key, value in node.items() if key not in ("weights", "sha256")}
        return options | ({"network_digest": metric.digest} if isinstance(metric, HasNetwork) else {})


def _real_vs_real(metric: SetMetric, pair: tuple[FeatureSet, FeatureSet] | None) -> dict[str, float]:
    try:
        return {} if pair is None else metric.compare(*pair).values
    except UserError as error:  # half of a set may be too small where the full set is not
        log.info("no floor (real images against real images): %s", error)
        return {}
