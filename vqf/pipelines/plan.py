"""What a run would need, before it is started: parameters, memory of every process, arithmetic, time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from vqf.config.access import image_size
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.pipelines.planning.benchmark import Measured, measure
from vqf.pipelines.planning.estimate import Estimate, estimate, estimate_drawing, stage_config, stages_of
from vqf.pipelines.planning.memory_tracker import Bytes
from vqf.pipelines.planning.suggestions import changed, changes, written
from vqf.registry import register
from vqf.terminal import log, table

GIB = 2**30
UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
DAY, HOUR, MINUTE = 86400, 3600, 60
BESIDE = (
    "beside this a GPU holds CUDA's own context, some hundred MiB, the workspaces of cuDNN and cuBLAS, and what the "
    "allocator keeps in pieces that fit nothing: leave a tenth of it free"
)
ROWS = ("weights", "gradients", "optimizer", "average", "discriminator", "frozen networks", "activations", "borrowed")


@register("pipeline", "plan")
class Plan:
    """Say what a run would need: parameters, memory of every process, arithmetic, time. No data is read.

    One step of each stage is done on tensors without content, as on `device`, which need not be there. What a kernel
    allocates for itself is not seen.

    Args:
        world: Processes that share a batch.
        memory: GiB that a process has. Where a run needs more, it says with which options it fits.
        flops: Operations that the device gets done in a second, to estimate the time from; fewer than its
            data sheet says.
        measure: Take real steps as well, on `device`, and say what they needed.
        classes: Labels that a conditioner is to know.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        world: int = 1,
        memory: float | None = None,
        flops: float | None = None,
        measure: bool = False,
        classes: int = 1000,
    ) -> None:
        for name, value in (("world", world), ("memory", memory), ("flops", flops), ("classes", classes)):
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}: must be more than 0")
        if measure and world > 1:
            raise UserError(f"measure=true takes the steps of one process; leave out world={world}")
        self.config, self.run_dir = config, run_dir
        self.world, self.memory, self.flops, self.measure, self.classes = world, memory, flops, measure, classes
        self.device = _device(config)

    def run(self) -> None:
        """Print tables and write `plan.json`."""
        plan: dict[str, Any] = {"device": str(self.device), "precision": self.config.precision, "world": self.world}
        plan["image_size"] = list(image_size(self.config))
        for name in stages_of(self.config):
            plan[name] = self._stage(name)
        if "stage2" in plan and (drawing := estimate_drawing(self.config, self.device, self.classes)):
            plan["sample"] = {"pictures": self.config.stage2.batch_size, "bytes": drawing}
            self._tell_drawing(drawing)
        self._tell_device()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "plan.json").write_text(json.dumps(plan, indent=1))
        log.info("written: %s", self.run_dir / "plan.json")

    def _stage(self, name: str) -> dict[str, Any]:
        found = self._estimate(name, self.config)
        measured = measure(name, self.config, make_engine(self.config), self.classes) if self.measure else None
        seconds = measured.seconds if measured else found.flops / self.flops if self.flops else None
        config = stage_config(self.config, name, self.world)
        steps, pictures = config.steps, config.batch_size
        table(f"{name}: parameters", ("part", "number"), [(k, f"{v:,}") for k, v in found.parameters.items()])
        _tell_memory(f"{name}: memory of a process, {pictures} pictures a step", found, self.world, measured)
        log.info("%s", summary(found, self.device, seconds, steps))
        facts = {"parameters": found.parameters, "bytes": found.peaks, "peak": _peaks(found), "flops": found.flops}
        facts |= {"tokens": found.tokens, "pictures": pictures, "steps": steps, "seconds": seconds}
        if measured:
            facts["measured_peak"] = measured.peak
        if self.memory is not None:
            facts["remedies"] = self._advise(name, found, self.memory * GIB)
        return facts

    def _estimate(self, name: str, config: DictConfig) -> Estimate:
        return estimate(name, config, self.device, self.world, self.classes)

    def _advise(self, name: str, found: Estimate, memory: float) -> dict[str, int]:
        """Say whether a stage fits, and if not, with which options it does."""
        needs = found.peak(self._view(self.config))
        if needs <= memory:
            log.info("%s fits into %s with %s to spare", name, size(memory), size(memory - needs))
            return {}
        log.info("%s does not fit into %s: it needs %s", name, size(memory), size(needs))
        remedies = dict(self._remedies(name, memory))
        for words, peak in remedies.items():
            log.info("  %s brings it to %s", words, size(peak))
        if not remedies:
            log.info("  no option alone makes it fit: fewer channels, or a smaller image_size")
        return remedies

    def _remedies(self, name: str, memory: float) -> Iterator[tuple[str, int]]:
        """Yield options that make a stage fit, the mildest of each kind, and its peak then."""
        for family in changes(name, stage_config(self.config, name, self.world), self.world):
            for change in family:
                config = changed(self.config, name, change)
                peak = self._estimate(name, config).peak(self._view(config))
                if peak <= memory:
                    yield written(change), peak
                    break

    def _view(self, config: DictConfig) -> str:
        if self.world == 1:
            return "single"
        return "fsdp2" if config.engine == "fsdp2" else "ddp"

    def _tell_device(self) -> None:
        """Say what the numbers are not of."""
        if self.device.type == "cuda":
            log.info("%s", BESIDE)
        elif str(self.config.device) == "auto":
            log.info(
                "planned for %s, which device=auto finds here; device=cuda plans for a GPU all the same", self.device
            )

    def _tell_drawing(self, drawing: Bytes) -> None:
        rows = [(kind, size(count)) for kind, count in drawing.items() if count]
        title = f"sample: memory, {self.config.stage2.batch_size} pictures at once"
        table(title, ("", "bytes"), [*rows, ("peak", size(sum(drawing.values())))])


def summary(found: Estimate, device: torch.device, seconds: float | None, steps: int) -> str:
    """Say it in a line."""
    peaks = ", ".join(
        f"{size(found.peak(view))} {'' if view == 'single' else f'under {view} '}at the peak" for view in found.peaks
    )
    line = f"{found.stage} on {device}: {found.trained:,} trained parameters, {found.tokens} tokens a picture, {peaks}"
    line += f", {found.flops / 1e12:.3g} TFLOP a step and process"
    if seconds is not None:
        line += f", {seconds:.3g} s a step, {duration(seconds * steps)} for {steps:,} steps"
    return line


def size(count: float) -> str:
    """Write a number of bytes."""
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), UNITS[-1])
    return f"{count / unit:.4g} {name}"


def duration(seconds: float) -> str:
    """Write a time."""
    for unit, name in ((DAY, "days"), (HOUR, "hours"), (MINUTE, "minutes")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} seconds"


def _tell_memory(title: str, found: Estimate, world: int, measured: Measured | None) -> None:
    header = ["", *(view if world == 1 else f"{view}, {world} processes" for view in found.peaks)]
    kinds = [kind for kind in ROWS if any(peak.get(kind) for peak in found.peaks.values())]
    rows = [[kind, *(size(peak.get(kind, 0)) for peak in found.peaks.values())] for kind in kinds]
    rows.append(["peak", *(size(found.peak(view)) for view in found.peaks)])
    if measured:
        rows.append(["peak, measured", size(measured.peak)])
    table(title, header, rows)


def _peaks(found: Estimate) -> Mapping[str, int]:
    return {view: found.peak(view) for view in found.peaks}


def _device(config: DictConfig) -> torch.device:
    """Return the device to plan for; a GPU need not be there."""
    if str(config.device).startswith("cuda"):
        return torch.device("cuda")
    config = config.copy()
    with open_dict(config):
        config.engine = "single"
    return make_engine(config).device
