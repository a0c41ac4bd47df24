"""Several ranks compute what one process does: the same gradients, scalars, codebooks, validations, checkpoints."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.support.composing import compose
from tests.support.processes import run_processes
from vqf.batch import Batch
from vqf.dataloading.order import ShuffledBatches
from vqf.dataloading.token_shards import TokenDataset
from vqf.discriminators.sync_batchnorm import SyncBatchNorm2d
from vqf.distributed import comm
from vqf.distributed.engine import make_engine, seed_everything
from vqf.models.tokenizer import build_tokenizer
from vqf.registry import build
from vqf.runs.checkpoint import open_checkpoint
from vqf.runs.load import build_generator
from vqf.training.prior_task import PriorTask
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task
from vqf.training.trainer import train

TINY = [
    "model=small",
    "data=emoji",
    "image_size=16",
    "batch_size=8",
    "steps=4",
    "optimizer.lr=1e-2",
    "model.encoder.channels=8",
    "model.encoder.dim=8",
    "model.decoder.channels=8",
    "model.quantizer.dim=4",
    "model.quantizer.codebook_size=16",
    "model/loss=[l1,l2]",
    "model.discriminator.channels=8",
    "model.discriminator.norm=sync_batch",
    "model.adversary.start=1",
    "model.adversary.ramp_steps=0",
    "model/prior=gpt",
    "model.prior.layers=2",
    "model.prior.heads=2",
    "model.prior.dim=16",
    "logger=[]",
    "metric=[psnr,usage]",
    "evaluate.count=9",
    "evaluate.every=2",
    "log.every=1",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]
HELD_BACK = ["+model/regularizer=[lecam,r1]", "model.regularizer.r1.every=2"]
CODES = 16
IMAGES = 24


@contextmanager
def double() -> Iterator[None]:
    """Build in float64, so that equal results agree to nine digits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    """Compare tensors by name, each relative to its largest entry; what is zero but for rounding has none."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=rtol * scale + 1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def make_images(keys: list[tuple[int, int]]) -> Batch:
    """Random images, a pure function of their keys."""
    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for _, i in keys]
    return Batch(images=torch.stack(images) * 2 - 1)


def order(config: Any) -> ShuffledBatches:
    part = {"rank": comm.rank(), "world_size": comm.world_size(), "accumulate": config.accumulate}
    return ShuffledBatches(IMAGES, config.batch_size, config.seed, **part)


def full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def watched(stage: Any) -> dict[str, Tensor]:
    """Record the gradients at each optimizer step of a task instead of stepping."""
    seen: dict[str, Tensor] = {}
    for key, optimizer in stage.optimizers.items():
        module = stage.modules[key]

        def keep(key: str = key, module: nn.Module = module) -> None:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    seen[f"{key}.{name}"] = full_tensor(parameter.grad).clone()

        optimizer.step = keep
    return seen


def numbers(log: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars that are logged: means over ranks."""
    means = comm.all_reduce_mean(torch.stack([value.double() for value in log.values()]))
    return {f"log {key}": mean for key, mean in zip(log, means, strict=True)}


def stage1_gradients(*overrides: str) -> dict[str, Tensor]:
    """Gradients, buffers and scalars of a step of stage 1, with the discriminator."""
    with nullcontext() if "precision=bf16" in overrides else double():
        config = compose(*TINY, *overrides)
        stage = build_tokenizer_task(config, build("data", config.data, image_size=16, seed=0), make_engine(config))
        seen = watched(stage)
        seed_everything(5)
        log = numbers(stage.step(2, make_images(order(config).batch(0))))
        stage.engine.sync_buffers(stage.modules.values())  # as the trainer does
        buffers = {f"buffer {key}": each for part in stage.modules.values() for key, each in part.named_buffers()}
    return {**seen, **log, **buffers}


def prior_stage(config: Any) -> PriorTask:
    """A prior task on random tokens of random classes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(config.model, 16)
    classes = build("data", config.data, image_size=16, seed=0).classes
    generator = build_generator(config, tokenizer, classes)
    noise = torch.Generator().manual_seed(1)
    shape = (IMAGES, tokenizer.layout.length)
    tokens = torch.randint(CODES, shape, generator=noise, dtype=torch.int32)
    labels = torch.randint(len(classes), (IMAGES,), generator=noise)
    dataset = TokenDataset([{"tokens": tokens, "labels": labels}], IMAGES)
    return PriorTask(generator, dataset, {"classes": list(classes)}, config, make_engine(config))


def stage2_gradients(*overrides: str) -> dict[str, Tensor]:
    """Gradients and scalars of a step of stage 2, and the scalars and images of its validation."""
    with double():
        config = compose(*TINY, "pipeline=stage2", *overrides)
        stage = prior_stage(config)
        seen = watched(stage)
        keys = order(config).batch(0)
        log = numbers(stage.step(0, stage.validation_tokens.gather(*map(list, zip(*keys, strict=True)))))
        with torch.no_grad(), stage.engine.unsharded(stage.model):
            validation = stage.evaluate(stage.model.eval())
    shown = {f"shown {name}": images for name, images in validation.images.items()}
    return {**seen, **log, **shown, **{key: torch.tensor(value) for key, value in validation.scalars.items()}}


SLOW = pytest.mark.slow
STAGE1 = [
    pytest.param(HELD_BACK, id="moving averages"),
    pytest.param([*HELD_BACK, "accumulate=2"], id="micro-batches", marks=SLOW),
    pytest.param(["model/quantizer=cosine", "model.quantizer.entropy=0.1"], id="entropy"),
]


@pytest.mark.parametrize("overrides", STAGE1)
def test_stage1_has_the_gradients_of_one_process_with_the_full_batch(overrides: list[str]) -> None:
    alone = stage1_gradients(*overrides)
    assert {"log gan_weight", "log grad_norm", "discriminator.discriminator.main.0.weight"} <= alone.keys()
    for found in run_processes(2, stage1_gradients, *overrides):
        close(found, alone)  # codebook, logits, usage and running statistics included


STAGE2 = [
    pytest.param([], id="plain"),
    pytest.param(["accumulate=2"], id="micro-batches", marks=SLOW),
    pytest.param(["engine=fsdp2", "model.prior.gradient_checkpointing=true"], id="shards", marks=SLOW),
]


@pytest.mark.parametrize("overrides", STAGE2)
def test_stage2_has_the_gradients_of_one_process_with_the_full_batch(overrides: list[str]) -> None:
    alone = stage2_gradients(*(each for each in overrides if "engine" not in each))
    first, second = run_processes(2, stage2_gradients, *overrides)
    assert "shown samples" in alone
    close(first, alone)
    close(second, {key: value for key, value in alone.items() if not key.startswith("shown ")})


def compiled(backend: str, *overrides: str) -> list[dict[str, Tensor]]:
    """The gradients of both stages, compiled by one of torch's backends."""
    torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]  # this process ends soon
    return [gradients("compile=true", *overrides) for gradients in (stage1_gradients, stage2_gradients)]


@SLOW
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_compiled_stages_have_the_same_gradients(engine: str) -> None:
    found, _ = run_processes(2, compiled, "aot_eager", f"engine={engine}")
    for each, gradients in zip(found, (stage1_gradients, stage2_gradients), strict=True):
        close(each, gradients())


@SLOW
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_equals_one_process_up_to_rounding(engine: str) -> None:
    options = ["precision=bf16", "model/quantizer=cosine", *HELD_BACK]
    alone = stage1_gradients(*options)
    found, _ = run_processes(2, stage1_gradients, f"engine={engine}", *options)
    numbers = ("log loss", "log gan_weight", "log grad_norm", "log d_loss")
    close({key: found[key] for key in numbers}, {key: alone[key] for key in numbers}, rtol=0.02)


def test_a_published_patchgan_normalizes_the_batch_of_each_rank() -> None:
    """Why `norm=sync_batch` exists: with `batch` all ranks have the same gradients, but not those of one process."""
    alone = stage1_gradients("model.discriminator.norm=batch")
    first, second = run_processes(2, stage1_gradients, "model.discriminator.norm=batch")
    close(first, second)
    name = "discriminator.discriminator.main.0.weight"
    assert (first[name] - alone[name]).abs().max() > 1e-3 * alone[name].abs().max()


def normalized(norm: type[nn.BatchNorm2d]) -> dict[str, Tensor]:
    """The output of a batch norm, its gradient, and the gradient of that gradient's square."""
    torch.manual_seed(0)
    layer = norm(3).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x_all, weights = (torch.randn(8, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    x = x_all.chunk(comm.world_size())[comm.rank()].clone().requires_grad_()
    y = layer(3 * x + 1)
    (slope,) = torch.autograd.grad((y * weights.chunk(comm.world_size())[comm.rank()]).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    per_rank = {"y": y.detach(), "slope": slope.detach(), "curvature": x.grad}
    gathered = {key: torch.cat(torch_all(each)) for key, each in per_rank.items()}
    return {**gathered, "weight": comm.all_reduce_sum(layer.weight.grad), **dict(layer.named_buffers())}


def torch_all(tensor: Tensor) -> list[Tensor]:
    return [
        comm.all_reduce_sum(tensor if comm.rank() == i else torch.zeros_like(tensor)) for i in range(comm.world_size())
    ]


def test_synchronized_batch_norm_is_batch_norm_of_the_full_batch() -> None:
    alone = normalized(nn.BatchNorm2d)
    for found in run_processes(2, normalized, SyncBatchNorm2d):
        close(found, alone)
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(SyncBatchNorm2d(3)(x), nn.BatchNorm2d(3)(x)), "one process needs none of it"


def noise() -> Tensor:
    seed_everything(0, "stage1", 7)
    return torch.rand(5)


def test_noise_depends_on_step_and_rank() -> None:
    first, second = run_processes(2, noise)
    assert torch.equal(first, noise()), "the first process draws what one alone would"
    assert not torch.equal(first, second)


# Adam multiplies what is rounded in a gradient that is nearly zero by lr / eps, and processors round differently.
LOOP = [*HELD_BACK, "ema=0.9", "clip=0.5", "schedule=cosine", "optimizer=adam", "optimizer.eps=1e-4"]


def trained(folder: str, *overrides: str) -> None:
    """Train stage 1 in float64."""
    with double():
        config = compose(*TINY, *LOOP, *overrides)
        engine = make_engine(config)
        stage = build_tokenizer_task(config, build("data", config.data, image_size=16, seed=0), engine)

        def source(start: int, stop: int) -> Iterator[Batch]:
            yield from (make_images(order(config).batch(step)) for step in range(start, stop))

        train(stage, config, Path(folder), engine, source)


def lines(folder: Path) -> dict[str, Tensor]:
    """Every scalar that a run has logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return {
        f"{row['step']} {key}": torch.tensor(float(value))
        for row in rows
        for key, value in row.items()
        if key != "time"
    }


def saved(folder: Path, step: int = 4) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    found = open_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    parts = [path.stem for path in found.path.glob("*.safetensors")]
    tensors = {f"{part} {key}": each for part in parts for key, each in found.load_weights(part).items()}
    for name, state in found.load_optimizers()["optimizers"].items():
        for number, entry in state["state"].items():
            tensors |= {f"{name} {number} {key}": each for key, each in entry.items()}
    return tensors


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    trained(str(folder))
    return folder


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=SLOW)])
def test_two_ranks_train_as_one_process_does(engine: str, alone: Path, tmp_path: Path) -> None:
    parts = ("encoder", "decoder") if engine == "fsdp2" else ()
    again = [f"model.{part}.gradient_checkpointing=true" for part in parts]
    run_processes(2, trained, str(tmp_path), f"engine={engine}", *again)
    assert len(lines(alone)) > 50
    close(lines(tmp_path), lines(alone), rtol=1e-7)  # printed from float32 in places
    close(saved(tmp_path), saved(alone))


@SLOW
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_codes_learned_by_gradient_move_to_the_same_latents(engine: str, tmp_path: Path) -> None:
    """With all weights on every rank, and with shards."""
    words = ["model/quantizer=vq", "model.quantizer.init=kmeans", "model.quantizer.revive=7", "accumulate=2"]
    trained(str(tmp_path / "alone"), *words)
    run_processes(2, trained, str(tmp_path / "two"), f"engine={engine}", *words)
    numbers = lines(tmp_path / "alone")
    assert sum(value for key, value in numbers.items() if key.endswith(" revived")) > 0
    assert float(numbers["1 perplexity"]) < float(numbers["4 perplexity"])
    close(lines(tmp_path / "two"), numbers, rtol=1e-7)
    close(saved(tmp_path / "two"), saved(tmp_path / "alone"))


@SLOW
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_resumes_with_another_number_of_ranks(engine: str, alone: Path, tmp_path: Path) -> None:
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    run_processes(2, trained, str(fewer), f"engine={engine}", "steps=2", "schedule=constant")
    trained(str(fewer), "resume=true", "schedule=constant")
    trained(str(more), "steps=2", "schedule=constant")
    run_processes(2, trained, str(more), f"engine={engine}", "resume=true", "schedule=constant")
    close(saved(fewer), saved(more))


def interrupted(folder: str, what: int, *overrides: str) -> None:
    """A run whose second process gets a signal in the middle of step 3."""
    original = TokenizerTask.step

    def step(self: TokenizerTask, number: int, batch: Batch) -> dict[str, Tensor]:
        if number == 3 and comm.rank() == 1:
            os.kill(os.getpid(), what)
        return original(self, number, batch)

    TokenizerTask.step = step  # type: ignore[method-assign]  # this process ends soon
    trained(folder, *overrides)


@SLOW
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_lost_a_process_resumes_bit_for_bit(what: signal.Signals, tmp_path: Path) -> None:
    long = ["steps=6", "model.discriminator.norm=batch"]
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    run_processes(2, trained, str(uninterrupted), *long)
    first, second = run_processes(2, interrupted, str(resumed), int(what), *long, may_die=True)
    if what == signal.SIGKILL:
        assert "RuntimeError" in first and second == "", "the other process ends as well"
    else:
        assert "SystemExit: 143" in first and "SystemExit: 143" in second
        assert (resumed / "checkpoints" / "step-00000004").is_dir()
    run_processes(2, trained, str(resumed), *long, "resume=true")
    expected, found = saved(uninterrupted, 6), saved(resumed, 6)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert lines(resumed) == lines(uninterrupted)


def killed(folder: str, who: int, after: float, *overrides: str) -> None:
    """A run of which one process is killed some seconds after its start."""
    if comm.rank() == who:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    trained(folder, *overrides)


@SLOW
def test_a_run_that_loses_processes_again_and_again_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Either of them, at a random moment: at the start, in a step, while it saves or validates."""
    long = ["steps=40", "checkpoint.every=2", "checkpoint.keep=2", "evaluate.every=3", "checkpoint.best=psnr"]
    uninterrupted, resumed, random = tmp_path / "uninterrupted", tmp_path / "resumed", Random(5)
    run_processes(2, trained, str(uninterrupted), *long)
    ended = []
    for kill in range(4):
        after = random.uniform(0.05, 1 + kill / 2)
        ended += run_processes(2, killed, str(resumed), random.randrange(2), after, *long, "resume=true", may_die=True)
    assert ended.count("") >= 3, "they were killed"
    run_processes(2, trained, str(resumed), *long, "resume=true")
    expected, found = saved(uninterrupted, 40), saved(resumed, 40)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert lines(resumed) == lines(uninterrupted)
