"""Estimate what a run needs before it starts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from vqf.config.access import image_size
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.options.ranges import PositiveFloat, PositiveInt
from vqf.pipelines.planning.benchmark import StepBenchmark, benchmark_step
from vqf.pipelines.planning.estimate import Estimate, estimate, estimate_sampling, stage_config, trainable_stages
from vqf.pipelines.planning.memory_tracker import Bytes
from vqf.pipelines.planning.suggestions import overrides_to_cli, suggestions, with_overrides
from vqf.registry import register
from vqf.terminal import format_bytes, format_seconds, log, print_table

GIB = 2**30
GPU_OVERHEAD_NOTE = (
    "not included: the CUDA context (some hundred MiB), the workspaces of cuDNN and cuBLAS, and fragmentation of the "
    "allocator; leave a tenth of the GPU's memory free"
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
    """Estimate what a run needs: parameters, memory per process, FLOPs and time. No data is read.

    One step of each stage runs on fake tensors; `device` need not be present. Memory inside of kernels is not counted.

    Args:
        world: Number of processes that share a batch.
        memory: Memory of a process in GiB. If a run needs more, options that make it fit are listed.
        flops: Sustained FLOP per second of the device, to estimate the time; below its peak.
        measure: Also run real steps on `device`, in one process, and report their memory and time.
        classes: Number of classes that a label conditioner is built for.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        world: PositiveInt = 1,
        memory: PositiveFloat | None = None,
        flops: PositiveFloat | None = None,
        measure: bool = False,
        classes: PositiveInt = 1000,
    ) -> None:
        if measure and world > 1:
            raise UserError(f"measure=true runs steps in one process; leave out world={world}")
        self.config, self.run_dir = config, run_dir
        self.world, self.memory, self.flops, self.measure, self.classes = world, memory, flops, measure, classes
        self.device = _planned_device(config)

    def run(self) -> None:
        plan: dict[str, Any] = {"device": str(self.device), "precision": self.config.precision, "world": self.world}
        plan["image_size"] = list(image_size(self.config))
        for name in trainable_stages(self.config):
            plan[name] = self._plan_stage(name)
        if "stage2" in plan and (peak := estimate_sampling(self.config, self.device, self.classes)):
            plan["sample"] = {"images": self.config.stage2.batch_size, "bytes": peak}
            self._print_sampling(peak)
        self._log_device_note()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / "plan.json").write_text(json.dumps(plan, indent=1))
        log.info("written: %s", self.run_dir / "plan.json")

    def _plan_stage(self, name: str) -> dict[str, Any]:
        estimated = self._estimate(name, self.config)
        measured = benchmark_step(name, self.config, make_engine(self.config), self.classes) if self.measure else None
        seconds = measured.seconds if measured else estimated.flops / self.flops if self.flops else None
        config = stage_config(self.config, name, self.world)
        steps, images = config.steps, config.batch_size
        print_table(
            f"{name}: parameters", ("module", "number"), [(k, f"{v:,}") for k, v in estimated.parameters.items()]
        )
        _print_memory(f"{name}: memory of a process, {images} images a step", estimated, self.world, measured)
        log.info("%s", summary(estimated, self.device, seconds, steps))
        plan: dict[str, Any] = {"parameters": estimated.parameters, "bytes": estimated.peaks, "peak": _peaks(estimated)}
        plan |= {"flops": estimated.flops, "tokens": estimated.tokens_per_image}
        plan |= {"images": images, "steps": steps, "seconds": seconds}
        if measured:
            plan["measured_peak"] = measured.peak
        if self.memory is not None:
            plan["suggestions"] = self._suggest(name, estimated, self.memory * GIB)
        return plan

    def _estimate(self, name: str, config: DictConfig) -> Estimate:
        return estimate(name, config, self.device, self.world, self.classes)

    def _suggest(self, name: str, estimated: Estimate, memory: float) -> dict[str, int]:
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
        for family in suggestions(name, stage_config(self.config, name, self.world), self.world):
            for overrides in family:
                config = with_overrides(self.config, name, overrides)
                peak = self._estimate(name, config).peak(self._engine_name(config))
                if peak <= memory:
                    yield overrides_to_cli(overrides), peak
                    break

    def _engine_name(self, config: DictConfig) -> str:
        if self.world == 1:
            return "single"
        return "fsdp2" if config.engine == "fsdp2" else "ddp"

    def _log_device_note(self) -> None:
        if self.device.type == "cuda":
            log.info("%s", GPU_OVERHEAD_NOTE)
        elif str(self.config.device) == "auto":
            log.info("planned for %s, which device=auto finds here; give device=cuda to plan for a GPU", self.device)

    def _print_sampling(self, peak: Bytes) -> None:
        rows = [(kind, format_bytes(count)) for kind, count in peak.items() if count]
        title = f"sample: memory, {self.config.stage2.batch_size} images at once"
        print_table(title, ("", "bytes"), [*rows, ("peak", format_bytes(sum(peak.values())))])


def summary(estimated: Estimate, device: torch.device, seconds: float | None, steps: int) -> str:
    """Summarize an estimate in one line."""
    peaks = ", ".join(
        f"{format_bytes(estimated.peak(strategy))} {'' if strategy == 'single' else f'under {strategy} '}at the peak"
        for strategy in estimated.peaks
    )
    line = f"{estimated.name} on {device}: {estimated.trainable:,} trained parameters, "
    line += f"{estimated.tokens_per_image} tokens an image, {peaks}"
    line += f", {estimated.flops / 1e12:.3g} TFLOP a step and process"
    if seconds is not None:
        line += f", {seconds:.3g} s a step, {format_seconds(seconds * steps)} for {steps:,} steps"
    return line


def _print_memory(title: str, estimated: Estimate, world: int, benchmark: StepBenchmark | None) -> None:
    header = ["", *(strategy if world == 1 else f"{strategy}, {world} processes" for strategy in estimated.peaks)]
    kinds = [kind for kind in MEMORY_KINDS if any(peak.get(kind) for peak in estimated.peaks.values())]
    rows = [[kind, *(format_bytes(peak.get(kind, 0)) for peak in estimated.peaks.values())] for kind in kinds]
    rows.append(["peak", *(format_bytes(estimated.peak(strategy)) for strategy in estimated.peaks)])
    if benchmark:
        rows.append(["peak, measured", format_bytes(benchmark.peak)])
    print_table(title, header, rows)


def _peaks(estimated: Estimate) -> Mapping[str, int]:
    return {strategy: estimated.peak(strategy) for strategy in estimated.peaks}


def _planned_device(config: DictConfig) -> torch.device:
    if str(config.device).startswith("cuda"):
        return torch.device("cuda")
    config = config.copy()
    with open_dict(config):
        config.engine = "single"
    return make_engine(config).device
