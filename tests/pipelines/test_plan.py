"""`pipeline=plan` against the allocator's record of real steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from tests.support.composing import compose
from tests.support.processes import run_processes
from vqf.config.settings import fill_missing_groups
from vqf.distributed import comm
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.pipelines import plan as plans
from vqf.pipelines.plan import Plan
from vqf.pipelines.planning.benchmark import benchmark_step
from vqf.pipelines.planning.estimate import (
    LOG_STEP_MULTIPLE,
    Estimate,
    build_task,
    estimate,
    estimate_sampling,
    stage_config,
)
from vqf.pipelines.planning.fake_tensors import AUTOCAST_TO_FLOAT32, CudaAutocastEmulation
from vqf.pipelines.planning.memory_tracker import MemoryTracker
from vqf.terminal import format_bytes, format_seconds
from vqf.training.ema import EMA

CPU = torch.device("cpu")

TINY = [
    "model=small",
    "data=emoji",
    "image_size=32",
    "batch_size=8",
    "steps=10",
    "model.encoder.channels=16",
    "model.decoder.channels=16",
    "model/quantizer=vq",
    "model.quantizer.codebook_size=64",
    "model.prior.dim=64",
    "device=cpu",
]


def tiny(*overrides: str) -> DictConfig:
    return fill_missing_groups(compose(*TINY, *overrides))


def allocated(name: str, config: DictConfig, steps: int = 2) -> list[int]:
    """Peak bytes of torch's CPU allocator in each step of a stage."""
    now = stage_config(config, name, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        job = build_task(name, now, make_engine(now), 10)
        average = None if now.ema is None else EMA(job.task.model, now.ema)
        for _ in range(steps):
            with torch.profiler.record_function("a step"):
                job.task.step(LOG_STEP_MULTIPLE, job.make_batch())
            if average:
                average.update(LOG_STEP_MULTIPLE)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    peaks, live = [], 0
    for event in events:
        if event.name() == "a step":
            peaks.append(0)
        elif event.name() == "[memory]":
            live += event.nbytes()
            peaks = [*peaks[:-1], max(peaks[-1], live)] if peaks else []
    return peaks


AGAIN = "model.encoder.gradient_checkpointing=true model.decoder.gradient_checkpointing=true"
SLOW = pytest.mark.slow
STEPS = [
    ("stage1", "model/loss=[l1]", []),
    ("stage1", "model.discriminator=null model.adversary=null optimizer=sgd model/loss=[l2] ema=0.99", []),
    ("stage2", "stage2.accumulate=4", []),
    ("stage1", "model/loss=[l1,features]", SLOW),
    ("stage1", "model/loss=[l1] accumulate=4", SLOW),
    ("stage1", f"model/loss=[l1] image_size=64 {AGAIN}", SLOW),
    ("stage2", "stage2.batch_size=32 model.prior.layers=8 model.prior.gradient_checkpointing=true", SLOW),
    ("stage1", "model/loss=[l1] precision=bf16 ema=0.99", SLOW),
    ("stage1", "model/loss=[l1] +model/regularizer=[lecam,r1] model/quantizer=ema optimizer=adamw", SLOW),
    ("stage1", "model/loss=[l1] model/quantizer=gumbel image_size=[32,64] clip=1", SLOW),
    ("stage2", "precision=bf16 model/prior=llama_small model.prior.layers=2 model.prior.heads=4", SLOW),
    ("stage2", "stage2.ema=0.99 model.prior.dropout=0", SLOW),
]


@pytest.mark.parametrize(("name", "words"), [pytest.param(*each[:2], marks=each[2]) for each in STEPS])
def test_the_peak_equals_that_of_real_steps(name: str, words: str) -> None:
    config = tiny(*words.split())
    planned = estimate(name, config, CPU, classes=10).peak("single")
    assert planned == pytest.approx(max(allocated(name, config)), rel=0.15)


def of_processes(name: str, overrides: list[str], kind: str) -> int:
    """The least peak of a step in one of several processes, once they know each other.

    It is that of two runs, to the byte, or of five.

    The threads that send may lag behind, on a machine that does much else. What they then free last the profiler does
    not see, and counts to the end: the places of DDP's gradients before it orders them anew, say. It never counts less.
    """
    config = tiny(*overrides, f"engine={kind}")
    config.batch_size //= comm.world_size()
    config.stage2.batch_size = config.batch_size
    peaks: list[int] = []
    for _ in range(5):
        peaks.append(min(allocated(name, config, steps=8)[2:]))
        seen_twice = peaks.count(min(peaks)) > 1
        if comm.all_reduce_sum(torch.tensor(float(seen_twice))) == comm.world_size():
            break
    return min(peaks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "kind"),
    [
        ("stage1", "model/loss=[l1] model.encoder.channels=64 model.decoder.channels=64 ema=0.9", "ddp"),
        ("stage1", "model/loss=[l1] model.encoder.channels=64 model.decoder.channels=64 ema=0.9", "fsdp2"),
        ("stage2", "model.prior.dim=256 model.prior.layers=6 stage2.batch_size=8", "ddp"),
        ("stage2", "model.prior.dim=256 model.prior.layers=6 stage2.batch_size=8", "fsdp2"),
    ],
)
def test_the_peak_of_each_of_two_processes(name: str, words: str, kind: str) -> None:
    planned = estimate(name, tiny(*words.split()), CPU, world=2, classes=10).peak(kind)
    for measured in run_processes(2, of_processes, name, words.split(), kind):
        assert planned == pytest.approx(measured, rel=0.15)


def test_a_measured_peak_equals_the_allocators() -> None:
    config = tiny("model/loss=[l1]", "ema=0.9")
    found = benchmark_step("stage1", config, make_engine(config), 10)
    assert found.peak == pytest.approx(max(allocated("stage1", config)), rel=0.02)
    assert found.seconds > 0


def test_the_memory_tracker_by_hand() -> None:
    x, weight = torch.ones(5, 7), nn.Parameter(torch.ones(7, 11))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    ledger = MemoryTracker(
        {"all": {}, "half": {"weights": 0.5, "gradients": 0.5, "optimizer": 0.5}, "none": {"weights": 0}}
    )
    ledger.track([weight], "weights")
    with ledger, ledger.tracking_optimizer([weight], optimizer, "gradients", "optimizer"):
        y = (x @ weight).square()  # the product is saved for the backward pass
        assert ledger.flops == 2 * 5 * 7 * 11
        assert ledger.live_bytes == {"weights": 4 * 77, "activations": 2 * 4 * 55}
        y.sum().backward()
        assert ledger.live_bytes["gradients"] == 4 * 77
        assert ledger.flops == 2 * (2 * 5 * 7 * 11)
        optimizer.step()
        assert ledger.live_bytes["optimizer"] == 4 * 77  # momentum
        optimizer.zero_grad()
        assert ledger.live_bytes["gradients"] == 0
        view = y[:2]
        before = ledger.live_bytes["activations"]
        del y
        assert ledger.live_bytes["activations"] == before  # its storage lives on in the view
        del view
        assert ledger.live_bytes["activations"] == before - 4 * 55
    assert sum(ledger.peaks["all"].values()) > sum(ledger.peaks["half"].values()) > 0
    assert ledger.peaks["half"]["weights"] == ledger.peaks["all"]["weights"] / 2
    assert ledger.peaks["none"]["weights"] == 0


def test_flops_match_the_published_formula() -> None:
    """A GPT of L layers of width d: 6 N per trained token, and 12 L d T for attention (Kaplan et al., 2020)."""
    config = tiny("model.prior.dropout=0", "model.prior.layers=4", "model.prior.dim=256", "stage2.batch_size=4")
    found = estimate("stage2", config, CPU, classes=10)
    matrices = 4 * 12 * 256**2 + 256 * 64
    expected = 4 * found.tokens_per_image * (6 * matrices + 12 * 4 * 256 * found.tokens_per_image)
    assert found.flops == pytest.approx(expected, rel=0.05)


def test_parameters_equal_those_of_the_model() -> None:
    config = tiny()
    job = build_task("stage1", config, make_engine(config), 10)
    found = estimate("stage1", config, CPU, classes=10)
    of = {name: sum(each.numel() for each in part.parameters()) for name, part in job.task.model.named_children()}
    of["discriminator"] = sum(each.numel() for each in job.task.gan.parameters())
    assert of.items() <= found.parameters.items()
    assert found.trainable == sum(of.values()) and found.tokens_per_image == 16


def test_processes_share_the_batch_and_fsdp_the_weights() -> None:
    config = tiny("model/loss=[l1]", "model.discriminator=null", "model.adversary=null", "ema=0.9")
    alone = estimate("stage1", config, CPU)
    several = estimate("stage1", config, CPU, world=4)
    quarter = estimate("stage1", tiny(*["model/loss=[l1]", "batch_size=2"]), CPU)
    assert several.flops == pytest.approx(alone.flops / 4, rel=0.05)
    assert quarter.parameters["encoder"] == several.parameters["encoder"]
    ddp, sharded = several.peaks["ddp"], several.peaks["fsdp2"]
    assert ddp["weights"] == alone.peaks["single"]["weights"]
    for kind in ("weights", "ema"):
        assert sharded[kind] == pytest.approx(ddp[kind] / 4)
    with pytest.raises(UserError, match="batch_size=8 cannot be divided among 3 processes"):
        estimate("stage1", config, CPU, world=3)


@pytest.mark.parametrize("prior", ["gpt_tiny", "llama_small"])
def test_sampling_needs_the_keys_and_values_of_every_token(prior: str) -> None:
    config = tiny(f"model/prior={prior}", "model.prior.layers=3", "model.prior.heads=4", "stage2.batch_size=5")
    found = estimate_sampling(config, CPU, classes=10)
    assert found is not None
    now = stage_config(config, "stage2", 1)
    stage = build_task("stage2", now, make_engine(now), 10).task
    prefix = stage.generator.conditioner(build_task("stage2", now, make_engine(now), 10).make_batch())
    _, cache = stage.model.eval().prefill(prefix)
    held = sum(each.keys.nbytes + each.values.nbytes for each in cache.kv_caches)
    assert found["cache"] == pytest.approx(held, rel=0.02)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "cross_entropy": lambda x: F.cross_entropy(x.flatten(1), x.argmax(1).flatten(1)[:, 0]),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "l1_loss": lambda x: F.l1_loss(x, x),
    "sum": lambda x: x.sum((1, 2)),
    "pow": lambda x: x.pow(2),
    "softplus": lambda x: F.softplus(x),
    "silu": lambda x: F.silu(x),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "square": lambda x: x.square(),
    "gelu": lambda x: F.gelu(x),
    "conv2d": lambda x: F.conv2d(x, x.float().mean(0, keepdim=True)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "leaky_relu": lambda x: F.leaky_relu(x),
    "mean": lambda x: x.mean(),
    "norm": lambda x: x.norm(),
}


@pytest.mark.parametrize("name", RULES)
def test_the_emulated_autocast_equals_that_of_cuda(name: str) -> None:
    """The oracle is torch's own autocast for CUDA, which applies to fake tensors even without a GPU."""
    function = RULES[name]
    with FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            expected = function(torch.empty(2, 4, 8, 8, dtype=torch.bfloat16, device="cuda")).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16), CudaAutocastEmulation():
            assert function(torch.empty(2, 4, 8, 8, dtype=torch.bfloat16)).dtype == expected


def test_the_autocast_rules_name_existing_functions() -> None:
    assert all(any(hasattr(home, name) for home in (torch, F, Tensor)) for name in AUTOCAST_TO_FLOAT32)


def test_a_gpu_need_not_be_present() -> None:
    config = tiny("model/loss=[l1]", "precision=bf16", "device=cuda")
    wide = estimate("stage1", config, torch.device("cuda")).peak("single")
    narrow = estimate("stage1", config, CPU).peak("single")
    assert wide > 1.05 * narrow  # group norms save float32
    assert Plan(config, Path("unused")).device.type == "cuda"


@pytest.mark.slow
def test_the_papers_model_needs_no_weights_and_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    config = fill_missing_groups(compose("model=vqgan", "data=folder", "data.root=/nowhere", "device=cuda"))
    first = estimate("stage1", config, torch.device("cuda"))
    assert sum(first.parameters[part] for part in first.parameters if part not in ("discriminator", "loss lpips")) == (
        72_141_699
    )
    assert first.parameters["loss lpips"] == 14_714_688 + 1472  # VGG16's convolutions, five heads
    assert estimate("stage2", config, torch.device("cuda")).tokens_per_image == 256


@pytest.mark.parametrize(
    ("word", "words"),
    [("auto", ["planned for cpu, which device=auto finds here"]), ("cuda", [plans.GPU_OVERHEAD_NOTE]), ("cpu", [])],
)
def test_the_plan_names_its_device(
    word: str, words: list[str], tmp_path: Path, lines: "LogLines", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    Plan(tiny("model/loss=[l1]", "model.prior=null", f"device={word}"), tmp_path, classes=10).run()
    device = "cuda" if word == "cuda" else "cpu"
    assert lines[0].startswith(f"stage1 on {device}: ")
    assert [line[: len(each)] for line, each in zip(lines[1:-1], words, strict=True)] == words


class LogLines(list[str]):
    """The lines of the log."""

    def info(self, text: str, *values: object) -> None:
        self.append(text % values)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> LogLines:
    lines = LogLines()
    monkeypatch.setattr(plans, "log", lines)
    return lines


def test_the_written_plan_equals_the_logged_one(
    tmp_path: Path, lines: LogLines, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("model/loss=[l1]", "stage2.batch_size=16")
    Plan(config, tmp_path / "here", flops=1e9, classes=10).run()
    written = json.loads((tmp_path / "here" / "plan.json").read_text())
    found = estimate("stage1", config, CPU, classes=10)
    assert written["stage1"]["peak"] == {"single": found.peak("single")}
    assert written["stage1"]["seconds"] == found.flops / 1e9
    assert written["stage2"]["images"] == 16 and written["sample"]["bytes"]["cache"] > 0
    assert lines[0].startswith(f"stage1 on cpu: {found.trainable:,} trained parameters, 16 tokens an image, ")
    assert lines[0].endswith(f" s a step, {format_seconds(written['stage1']['seconds'] * 10)} for 10 steps")
    assert "memory of a process" in capsys.readouterr().out


def test_measured_steps_are_part_of_the_plan(tmp_path: Path, lines: LogLines) -> None:
    Plan(tiny("model/loss=[l1]", "model/prior=gpt_tiny"), tmp_path, measure=True, classes=10).run()
    written = json.loads((tmp_path / "plan.json").read_text())
    for stage in ("stage1", "stage2"):
        assert written[stage]["measured_peak"] == pytest.approx(written[stage]["peak"]["single"], rel=0.15)
        assert written[stage]["seconds"] > 0


def fake_estimate(name: str, config: DictConfig, device: torch.device, world: int = 1, classes: int = 0) -> Estimate:
    """An estimate of 1,200 bytes for an image of a micro-batch, less in bf16 and with checkpoints; 300 of weights."""
    share = (0.5 if config.precision == "bf16" else 1) * (0.75 if config.model.encoder.gradient_checkpointing else 1)
    images = config.batch_size / config.accumulate / world * 1200 * share
    peaks = {"single": {"activations": images, "weights": 300}}
    if world > 1:
        peaks = {"ddp": peaks["single"], "fsdp2": {"activations": images, "weights": 300 / world}}
    return Estimate(name, {}, 0, 1, peaks, 0)


@pytest.mark.parametrize(
    ("memory", "words", "suggestions"),
    [
        (10000, "", {}),
        (8000, "", {"accumulate=2": 5100, "precision=bf16": 5100, AGAIN: 7500, f"precision=bf16 {AGAIN}": 3900}),
        (
            4000,
            "accumulate=2",
            {"accumulate=4": 2700, "precision=bf16": 2700, AGAIN: 3900, f"precision=bf16 {AGAIN}": 2100},
        ),
        (1000, "", {"precision=bf16 accumulate=8": 900, f"precision=bf16 {AGAIN} accumulate=8": 750}),
        (10, "", {}),
    ],
)
def test_options_that_make_a_run_fit_are_listed(
    memory: int, words: str, suggestions: dict, tmp_path: Path, lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "estimate", fake_estimate)
    monkeypatch.setattr(plans, "trainable_stages", lambda config: ["stage1"])
    Plan(tiny(*words.split()), tmp_path, memory=(memory + 100) / 2**30).run()
    assert json.loads((tmp_path / "plan.json").read_text())["stage1"]["suggestions"] == suggestions
    assert (
        lines[2:-1] == [f"  {words} brings it to {format_bytes(peak)}" for words, peak in suggestions.items()]
        or not suggestions
    )
    assert lines[1].startswith("stage1 fits into 9.863 KiB with 200 bytes to spare") == (memory == 10000)
    assert ("fewer channels" in lines[2]) == (memory == 10)


def test_sharding_is_one_of_the_options(tmp_path: Path, lines: LogLines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "estimate", fake_estimate)
    Plan(tiny("batch_size=2"), tmp_path, world=2, memory=1400 / 2**30).run()
    suggestions = json.loads((tmp_path / "plan.json").read_text())["stage1"]["suggestions"]
    assert suggestions == {"precision=bf16": 900, AGAIN: 1200, "engine=fsdp2": 1350, f"precision=bf16 {AGAIN}": 750}


@pytest.mark.slow
def test_accumulation_lowers_the_peak() -> None:
    peaks = [estimate("stage1", tiny("model/loss=[l1]", f"accumulate={n}"), CPU).peak("single") for n in (1, 2, 4)]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world": 3}, "batch_size=8 cannot be divided among 3 processes and accumulate=1 micro-batches"),
        ({"world": 2, "measure": True}, "measure=true runs steps in one process; leave out world=2"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, lines: LogLines, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plan(tiny("model.prior=null"), tmp_path, **options).run()
