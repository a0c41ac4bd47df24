"""What every evaluation needs, whatever it measures: the pictures of a protocol, the metrics, and the reference."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.access import chosen
from vqf.dataloading.image_files import PARTS
from vqf.dataloading.subject import build_subject
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.evaluation.feature_cache import Pictures, Reference, Sets, Statistics, floor_sets
from vqf.evaluation.preprocessing import cropped
from vqf.evaluation.protocols import ORIGINALS, digest, how
from vqf.evaluation.reconstruction import build_metrics
from vqf.evaluation.result import Measurement
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Comparison, EvaluationProtocol, FeatureSet, Metric, SetMetric
from vqf.runs.checkpoint import Checkpoint
from vqf.terminal import log


class Bench:
    """Holds what a model is measured with.

    Args:
        config: Names data and metrics.
        protocol: What is measured on which pictures.
        tokenizer: Of the model; its size is the size of all pictures.
        engine: Where networks run.
        statistics: Where it is kept what networks saw in real pictures.

    Raises:
        UserError: If a metric, the data or the reference cannot be had.
    """

    def __init__(
        self,
        config: DictConfig,
        protocol: EvaluationProtocol,
        tokenizer: Tokenizer,
        engine: Engine,
        statistics: Statistics,
    ) -> None:
        self.config, self.protocol, self.tokenizer, self.engine = config.copy(), protocol, tokenizer, engine
        self.statistics = statistics
        with open_dict(self.config):
            self.config.seed = protocol.seed  # a data source may vary its pictures by it
        metrics = build_metrics(config, tokenizer.vocab_size, engine)
        self.sets = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
        self.others: dict[str, Metric] = {name: each for name, each in metrics.items() if name not in self.sets}
        self.networks = {metric.network.digest: metric.network for metric in self.sets.values()}
        self.data = build_subject(self.config, tokenizer.image_size)

    def pictures(self, part: str, count: int | None = None) -> Pictures:
        """Return the pictures of a part of the data."""
        protocol, config, size = self.protocol, self.config, self.tokenizer.image_size
        split = cropped(self.data.split(part), size, protocol.crop, protocol.resize)
        count = min(count or len(split), len(split))
        if count < 2:
            raise UserError(f"data: {count} picture for {part}; an evaluation needs at least two")
        seen = digest({"pictures": split.fingerprint, "size": size, **how(protocol.crop, protocol.resize)})
        loading = (config.batch_size, config.workers, self.engine.device, config.worker_timeout)
        return Pictures(split, seen, count, protocol.rounding, *loading)

    def check(self, checkpoint: Checkpoint) -> None:
        """Warn if the held-out pictures are not those of the training: the model may have learned them."""
        known, part = checkpoint.state.get("held_out"), "validation"
        if known and self.protocol.part == part and known != (found := self.data.split(part).fingerprint):
            words = (
                "the held-out pictures are not those of the training (%s then, %s now): the numbers cannot be compared "
                "with the training's, and the model may have learned some of the pictures"
            )
            log.warning(words, known[:8], found[:8])

    def reference(self) -> Reference | None:
        """Look at the reference, or read what was seen in it before; None where it is the originals.

        Raises:
            UserError: If there is no such part of the data, and no such file.
        """
        name = self.protocol.reference
        if name == ORIGINALS:
            return None
        if name in PARTS:
            return self.statistics.of_part(self.pictures(name), self.networks)
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"protocol.reference={name}: no such file, and not one of {', '.join(PARTS)}")
        return self.statistics.of_file(path, self.networks, self.config.batch_size, self.engine.device)

    def facts(self, pictures: str, count: int, reference: Reference) -> dict[str, Any]:
        """Return the lines of the protocol that every task has.

        Args:
            pictures: The hash of what is reconstructed, or held out.
            count: What is reconstructed or generated.
            reference: With what it is compared.
        """
        protocol = self.protocol
        found = {
            "pictures": pictures,
            "count": count,
            "image_size": " x ".join(map(str, self.tokenizer.image_size)),
            **how(protocol.crop, protocol.resize),
            "reference_pictures": reference.digest,
            "reference_count": reference.count,
        }
        return {**self.lines(), **found}

    def lines(self) -> dict[str, Any]:
        """Return the lines of the protocol that are known before a picture is."""
        protocol, config = self.protocol, self.config
        of = {"name": config.protocol.name, "task": protocol.task, "data": config.data.name}
        of |= {"subject": config.subject, "precision": config.precision}
        own = {each.name: getattr(protocol, each.name) for each in fields(protocol)}  # type: ignore[arg-type]
        if own["reference"] not in (ORIGINALS, *PARTS):
            own["reference"] = Path(protocol.reference).name  # a path says where, the hash says what
        return {**of, **own}

    def compare(self, found: Measurement, reference: Reference, generated: Sets, count: int) -> None:
        """Add what every set metric says of generated pictures, and of real ones in their place."""
        pairs = {key: floor_sets(each, count, self.protocol.seed) for key, each in reference.sets.items()}
        for name, metric in self.sets.items():
            key = metric.network.digest
            said = metric.compare(reference.sets[key], generated[key])
            prefix = metric.prefix if self.protocol.task == "reconstruction" else ""
            found.add(metric, said, self.settings(name, metric), prefix)
            found.floors |= {f"{prefix}{each}": value for each, value in _floor(metric, pairs[key]).items()}

    def finish(self, found: Measurement, names: Mapping[str, Metric]) -> None:
        """Add what the metrics say that looked at every batch."""
        for name, metric in names.items():
            intervals = metric.intervals() if hasattr(metric, "intervals") else {}
            found.add(metric, Comparison(metric.compute(), intervals), self.settings(name, metric))

    def settings(self, name: str, metric: Any) -> dict[str, Any]:
        """Return the options of a metric; in place of where its weights lie, their hash."""
        node = OmegaConf.to_container(chosen(self.config, "metric")[name], resolve=True)
        assert isinstance(node, dict)
        options = {str(key): value for key, value in node.items() if key not in ("weights", "sha256")}
        return options | ({"network_digest": metric.digest} if hasattr(metric, "digest") else {})


def _floor(metric: SetMetric, pair: tuple[FeatureSet, FeatureSet] | None) -> dict[str, float]:
    try:
        return {} if pair is None else metric.compare(*pair).values
    except UserError as error:  # half of a set may be too few where the whole is enough
        log.info("no real pictures against real ones: %s", error)
        return {}
