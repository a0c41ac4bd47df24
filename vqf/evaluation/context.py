"""What every evaluation needs, whatever it measures: the images of a protocol, the metrics, and the reference."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.access import group_nodes
from vqf.dataloading.image_files import SPLITS
from vqf.dataloading.training_target import build_target_data
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.evaluation.feature_cache import (
    EvaluationImages,
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
from vqf.protocols import EvaluationProtocol, FeatureSet, Metric, SetMetric, SetMetricResult
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log


class EvaluationContext:
    """Holds what a model is measured with.

    Args:
        config: Names data and metrics.
        protocol: What is measured on which images.
        tokenizer: Of the model; its size is the size of all images.
        engine: Where networks run.
        feature_cache: Where it is kept what networks saw in real images.

    Raises:
        UserError: If a metric, the data or the reference cannot be had.
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
            self.config.seed = protocol.seed  # a data source may vary its images by it
        metrics = build_metrics(config, tokenizer.vocab_size, engine)
        self.set_metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
        self.batch_metrics: dict[str, Metric] = {
            name: each for name, each in metrics.items() if name not in self.set_metrics
        }
        self.feature_networks = {metric.network.digest: metric.network for metric in self.set_metrics.values()}
        self.data = build_target_data(self.config, tokenizer.image_size)

    def images(self, split_name: str, count: int | None = None) -> EvaluationImages:
        """Return the images of a part of the data."""
        protocol, config, size = self.protocol, self.config, self.tokenizer.image_size
        split = crop_split(self.data.split(split_name), size, protocol.crop, protocol.resize)
        count = min(count or len(split), len(split))
        if count < 2:
            raise UserError(f"data: {count} image for {split_name}; an evaluation needs at least two")
        seen = stable_hash(
            {"images": split.fingerprint, "size": size, **preprocessing_lines(protocol.crop, protocol.resize)}
        )
        loading = (config.batch_size, config.workers, self.engine.device, config.worker_timeout)
        return EvaluationImages(split, seen, count, protocol.rounding, *loading)

    def warn_if_validation_changed(self, checkpoint: Checkpoint) -> None:
        """Warn if the held-out images are not those of the training: the model may have learned them."""
        known, part = checkpoint.state.get("validation_fingerprint"), "validation"
        if known and self.protocol.part == part and known != (found := self.data.split(part).fingerprint):
            words = (
                "the held-out images are not those of the training (%s then, %s now): the numbers cannot be compared "
                "with the training's, and the model may have learned some of the images"
            )
            log.warning(words, known[:8], found[:8])

    def reference(self) -> ReferenceSet | None:
        """Look at the reference, or read what was seen in it before; None where it is the originals.

        Raises:
            UserError: If there is no such part of the data, and no such file.
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
        """Return the lines of the protocol that every task has.

        Args:
            images_hash: The hash of what is reconstructed, or held out.
            count: What is reconstructed or generated.
            reference: With what it is compared.
        """
        protocol = self.protocol
        found = {
            "images": images_hash,
            "count": count,
            "image_size": " x ".join(map(str, self.tokenizer.image_size)),
            **preprocessing_lines(protocol.crop, protocol.resize),
            "reference_images": reference.digest,
            "reference_count": reference.count,
        }
        return {**self.protocol_lines(), **found}

    def protocol_lines(self) -> dict[str, Any]:
        """Return the lines of the protocol that are known before an image is."""
        protocol, config = self.protocol, self.config
        of = {"name": config.protocol.name, "task": protocol.task, "data": config.data.name}
        of |= {"target": config.target, "precision": config.precision}
        own = {each.name: getattr(protocol, each.name) for each in fields(protocol)}  # type: ignore[arg-type]
        if own["reference"] not in (ORIGINALS, *SPLITS):
            own["reference"] = Path(protocol.reference).name  # a path says where, the hash says what
        return {**of, **own}

    def add_set_metrics(
        self, result: EvaluationResult, reference: ReferenceSet, generated: FeatureSets, count: int
    ) -> None:
        """Add what every set metric says of generated images, and of real ones in their place."""
        pairs = {key: real_vs_real(each, count, self.protocol.seed) for key, each in reference.feature_sets.items()}
        for name, metric in self.set_metrics.items():
            key = metric.network.digest
            said = metric.compare(reference.feature_sets[key], generated[key])
            prefix = metric.reconstruction_prefix if self.protocol.task == "reconstruction" else ""
            result.add(metric, said, self.metric_settings(name, metric), prefix)
            result.floors |= {f"{prefix}{each}": value for each, value in _real_vs_real(metric, pairs[key]).items()}

    def add_metrics(self, result: EvaluationResult, metrics: Mapping[str, Metric]) -> None:
        """Add what the metrics say that looked at every batch."""
        for name, metric in metrics.items():
            intervals = metric.intervals() if hasattr(metric, "intervals") else {}
            result.add(metric, SetMetricResult(metric.compute(), intervals), self.metric_settings(name, metric))

    def metric_settings(self, name: str, metric: Any) -> dict[str, Any]:
        """Return the options of a metric; in place of where its weights lie, their hash."""
        node = OmegaConf.to_container(group_nodes(self.config, "metric")[name], resolve=True)
        assert isinstance(node, dict)
        options = {str(key): value for key, value in node.items() if key not in ("weights", "sha256")}
        return options | ({"network_digest": metric.digest} if hasattr(metric, "digest") else {})


def _real_vs_real(metric: SetMetric, pair: tuple[FeatureSet, FeatureSet] | None) -> dict[str, float]:
    try:
        return {} if pair is None else metric.compare(*pair).values
    except UserError as error:  # half of a set may be too few where the whole is enough
        log.info("no real images against real ones: %s", error)
        return {}
