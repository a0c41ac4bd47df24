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
from vqf.pipelines.planning.benchmark import StepBenchmark, benchmark_step
from vqf.pipelines.planning.estimate import Estimate, estimate, estimate_sampling, stage_config, trainable_stages
from vqf.pipelines.planning.memory_tracker import Bytes
from vqf.pipelines.planning.suggestions import overrides_to_cli, suggestions, with_overrides
from vqf.registry import register
from vqf.terminal import format_bytes, format_seconds, log, print_table

GIB = 2**30
GPU_OVERHEAD_NOTE = (
    "beside this a GPU holds CUDA's own context, some hundred MiB, the workspaces of cuDNN and cuBLAS, and what the "
    "allocator keeps in pieces that fit nothing: leave a tenth of it free"
)
MEMORY_KINDS = (
    "weights",
    "gradients",
    "optimizer",
    "ema",
    "discriminator",
    "frozen networks",
    "activations",
    "communication",
)


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
        self.device = _planned_device(config)

    def run(self) -> None:
        """Print tables and write `plan.json`."""
        plan: dict[str, Any] = {"device": str(self.device), "precision": self.config.precision, "world": self.world}
        plan["image_size"] = list(image_size(self.config))
        for name in trainable_stages(self.config):
            plan[name] = self._plan_stage(name)
        if "stage2" in plan and (drawing := estimate_sampling(self.config, self.device, self.classes)):
            plan["sample"] = {"images": self.config.stage2.batch_size, "bytes": drawing}
            self._print_sampling(drawing)
        self._log_device_note()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "plan.json").write_text(json.dumps(plan, indent=1))
        log.info("written: %s", self.run_dir / "plan.json")

    def _plan_stage(self, name: str) -> dict[str, Any]:
        found = self._estimate(name, self.config)
        measured = benchmark_step(name, self.config, make_engine(self.config), self.classes) if self.measure else None
        seconds = measured.seconds if measured else found.flops / self.flops if self.flops else None
        config = stage_config(self.config, name, self.world)
        steps, images = config.steps, config.batch_size
        print_table(f"{name}: parameters", ("part", "number"), [(k, f"{v:,}") for k, v in found.parameters.items()])
        _print_memory(f"{name}: memory of a process, {images} images a step", found, self.world, measured)
        log.info("%s", summary(found, self.device, seconds, steps))
        facts = {"parameters": found.parameters, "bytes": found.peaks, "peak": _peaks(found), "flops": found.flops}
        facts |= {"tokens": found.tokens_per_image, "images": images, "steps": steps, "seconds": seconds}
        if measured:
            facts["measured_peak"] = measured.peak
        if self.memory is not None:
            facts["suggestions"] = self._suggest(name, found, self.memory * GIB)
        return facts

    def _estimate(self, name: str, config: DictConfig) -> Estimate:
        return estimate(name, config, self.device, self.world, self.classes)

    def _suggest(self, name: str, estimated: Estimate, memory: float) -> dict[str, int]:
        """Say whether a stage fits, and if not, with which options it does."""
        needs = estimated.peak(self._engine_name(self.config))
        if needs <= memory:
            log.info("%s fits into %s with %s to spare", name, format_bytes(memory), format_bytes(memory - needs))
            return {}
        log.info("%s does not fit into %s: it needs %s", name, format_bytes(memory), format_bytes(needs))
        fitting = dict(self._fitting_overrides(name, memory))
        for overrides, peak in fitting.items():
            log.info("  %s brings it to %s", overrides, format_bytes(peak))
        if not fitting:
            log.info("  no option alone makes it fit: fewer channels, or a smaller image_size")
        return fitting

    def _fitting_overrides(self, name: str, memory: float) -> Iterator[tuple[str, int]]:
        """Yield options that make a stage fit, the mildest of each kind, and its peak then."""
        for family in suggestions(name, stage_config(self.config, name, self.world), self.world):
            for change in family:
                config = with_overrides(self.config, name, change)
                peak = self._estimate(name, config).peak(self._engine_name(config))
                if peak <= memory:
                    yield overrides_to_cli(change), peak
                    break

    def _engine_name(self, config: DictConfig) -> str:
        if self.world == 1:
            return "single"
        return "fsdp2" if config.engine == "fsdp2" else "ddp"

    def _log_device_note(self) -> None:
        """Say what the numbers are not of."""
        if self.device.type == "cuda":
            log.info("%s", GPU_OVERHEAD_NOTE)
        elif str(self.config.device) == "auto":
            log.info(
                "planned for %s, which device=auto finds here; device=cuda plans for a GPU all the same", self.device
            )

    def _print_sampling(self, peak: Bytes) -> None:
        rows = [(kind, format_bytes(count)) for kind, count in peak.items() if count]
        title = f"sample: memory, {self.config.stage2.batch_size} images at once"
        print_table(title, ("", "bytes"), [*rows, ("peak", format_bytes(sum(peak.values())))])


def summary(estimated: Estimate, device: torch.device, seconds: float | None, steps: int) -> str:
    """Say it in a line."""
    peaks = ", ".join(
        f"{format_bytes(estimated.peak(view))} {'' if view == 'single' else f'under {view} '}at the peak"
        for view in estimated.peaks
    )
    line = f"{estimated.name} on {device}: {estimated.trainable:,} trained parameters, "
    line += f"{estimated.tokens_per_image} tokens an image, {peaks}"
    line += f", {estimated.flops / 1e12:.3g} TFLOP a step and process"
    if seconds is not None:
        line += f", {seconds:.3g} s a step, {format_seconds(seconds * steps)} for {steps:,} steps"
    return line


def _print_memory(title: str, estimated: Estimate, world: int, benchmark: StepBenchmark | None) -> None:
    header = ["", *(view if world == 1 else f"{view}, {world} processes" for view in estimated.peaks)]
    kinds = [kind for kind in MEMORY_KINDS if any(peak.get(kind) for peak in estimated.peaks.values())]
    rows = [[kind, *(format_bytes(peak.get(kind, 0)) for peak in estimated.peaks.values())] for kind in kinds]
    rows.append(["peak", *(format_bytes(estimated.peak(view)) for view in estimated.peaks)])
    if benchmark:
        rows.append(["peak, measured", format_bytes(benchmark.peak)])
    print_table(title, header, rows)


def _peaks(estimated: Estimate) -> Mapping[str, int]:
    return {view: estimated.peak(view) for view in estimated.peaks}


def _planned_device(config: DictConfig) -> torch.device:
    """Return the device to plan for; a GPU need not be there."""
    if str(config.device).startswith("cuda"):
        return torch.device("cuda")
    config = config.copy()
    with open_dict(config):
        config.engine = "single"
    return make_engine(config).device
