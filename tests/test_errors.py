"""Messages for mistakes on the command line: one line each, with the cure."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from vqf import registry
from vqf.config.compose import check_command, config_dir, flags_first
from vqf.errors import UserError, closest_match, unknown_key_message, unknown_message
from vqf.registry import KINDS, register

PRESETS = {
    "model/small": "{defaults: [_self_, {quantizer: vq}, {loss: [l1]}, {discriminator: patch}], prior: null}",
    "model/quantizer/vq_16k": "{defaults: [vq], size: 16384}",
    "experiment/quickstart": "{defaults: [{override /model/quantizer: ema}], steps: 3}",
    "experiment/stale": "{defaults: [{override /model/quantizer: vq_17k}]}",
    "experiment/mistyped": "{model: {quantizer: {beta: big}}}",
    "experiment/misspelt": "{stepz: 3, model: {quantiser: {beta: 1}}}",
    "experiment/broken": "{steps: [",
    "experiment/listed": "[a, b]",
    "experiment/sweep": "{hydra: {mode: MULTIRUN}}",
}


def vq(*, size: int = 512, beta: float = 0.25, cosine: bool = False, mode: Literal["a", "soft"] = "a") -> None: ...


def ema(*, decay: float = 0.99, sizes: tuple[int, ...] = (1, 2), extra: dict[str, int] | None = None) -> None: ...


def seen(*, crop: str = "center") -> None: ...


def drawn(*, labels: str = "balanced") -> None: ...


def loss(*, weight: float = 1.0) -> None: ...


def emoji(image_size: int) -> None: ...


def folder(image_size: int, *, root: str) -> None: ...


def pipeline(config: Any, run_dir: Path) -> None: ...


def sample(config: Any, run_dir: Path, *, count: int = 4) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with a few toy components, so that the lists of known names are short; yields its conf/."""
    Plugins.instance()
    conf = tmp_path_factory.mktemp("conf")
    store = ConfigStore.instance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_components", {kind: {} for kind in KINDS})
        patch.setattr(store, "repo", {key: store.repo[key] for key in ("hydra", "_dummy_empty_config_.yaml")})
        _register()
        own = OmegaConf.load(config_dir() / "config.yaml")
        own.defaults = OmegaConf.create(
            "[_self_, {model: small}, {data: emoji}, {pipeline: stage1}, {metric: [psnr]}, {experiment: null}]"
        )
        OmegaConf.save(own, conf / "config.yaml")
        for name, text in PRESETS.items():
            path = conf / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            package = "# @package _global_\n" if name.startswith("experiment") else ""
            path.write_text(f"{package}{text}\n")
        yield conf


def _register() -> None:
    register("protocol", "seen")(seen)
    register("protocol", "drawn")(drawn)
    register("protocol", "sampled")(drawn)
    register("quantizer", "vq")(vq)
    register("quantizer", "ema")(ema)
    register("loss", "l1")(loss)
    register("loss", "l2")(lambda *, weight=1.0: None)
    register("discriminator", "patch")(lambda in_channels: None)
    register("data", "emoji")(emoji)
    register("data", "folder")(folder)
    register("metric", "psnr")(lambda: None)
    register("pipeline", "stage1")(pipeline)
    register("pipeline", "sample")(sample)


def errors(conf: Path, line: str) -> list[str]:
    """The messages of `check_command` for a command line."""
    try:
        check_command(flags_first(["-cp", str(conf), *shlex.split(line)]))
    except UserError as error:
        return str(error).splitlines()
    return []


HELP = "python -m vqf.run --help lists them."

ONE_MISTAKE = [
    # unknown names
    ("model/quantizer=vqq", "model/quantizer=vqq: unknown quantizer 'vqq'. Did you mean 'vq'? Known: ema, vq, vq_16k."),
    ("model/quantizer=xyz", "model/quantizer=xyz: unknown quantizer 'xyz'. Known: ema, vq, vq_16k."),
    ("model/quantizer=", "model/quantizer=: unknown quantizer ''. Known: ema, vq, vq_16k."),
    ("model/loss=[l1,l3]", "model/loss=[l1,l3]: unknown loss 'l3'. Known: l1, l2."),
    ("model=smal", "model=smal: unknown model 'smal'. Did you mean 'small'? Known: small."),
    ("pipeline=sampel", "pipeline=sampel: unknown pipeline 'sampel'. Did you mean 'sample'? Known: sample, stage1."),
    (
        "experiment=quikstart",
        "experiment=quikstart: unknown experiment 'quikstart'. Did you mean 'quickstart'? "
        "Known: broken, listed, misspelt, mistyped, quickstart, stale, sweep.",
    ),
    (
        "hydra/launcher=slurm",
        "hydra/launcher=slurm: unknown launcher 'slurm'. Known: basic, joblib, submitit_local, submitit_slurm.",
    ),
    # unknown groups and options
    ("modle=small", f"modle=small: unknown option 'modle'. Did you mean 'model'? {HELP}"),
    (
        "modle/quantizer=vq",
        "modle/quantizer=vq: unknown option 'modle'. Did you mean 'model'? "
        "Known: data, experiment, metric, model, pipeline, protocol.",
    ),
    (
        "model/quantiser=vq",
        "model/quantiser=vq: unknown option 'quantiser' in model. Did you mean 'quantizer'? "
        "Known: discriminator, loss, quantizer.",
    ),
    ("quantizer=ema", "quantizer=ema: write model/quantizer=ema"),
    ("stepz=5", f"stepz=5: unknown option 'stepz'. Did you mean 'steps'? {HELP}"),
    ("qqqq=5", f"qqqq=5: unknown option 'qqqq'. {HELP}"),
    ("beta=5", f"beta=5: unknown option 'beta'. Did you mean 'model.quantizer.beta'? {HELP}"),
    (
        "protocol.labels=uniform",
        "protocol.labels=uniform: no protocol is chosen; add protocol=drawn or sampled",
    ),
    (
        "protocol.zzz=1",
        "protocol.zzz=1: no protocol is chosen; add protocol=drawn or sampled or seen",
    ),
    ("count=5", "count=5: an option of pipeline=sample; this is pipeline=stage1"),
    (
        "model.quantiser.beta=1",
        "model.quantiser.beta=1: unknown option 'quantiser' in model. Did you mean 'quantizer'? "
        "Known: discriminator, loss, prior, projection, quantizer.",
    ),
    ("model.loss.l2.weight=1", "model.loss.l2.weight=1: unknown option 'l2' in model.loss. Known: l1."),
    ("log.evry=1", "log.evry=1: unknown option 'evry' in log. Did you mean 'every'? Known: every."),
    (
        "model.quantizer.betta=1",
        "model.quantizer.betta: unknown option 'betta'. Did you mean 'beta'? "
        "quantizer 'vq' (tests.test_errors.vq) takes: "
        "size: int = 512, beta: float = 0.25, cosine: bool = False, mode: Literal['a', 'soft'] = 'a'",
    ),
    (
        "data.root=x",
        "data.root: unknown option 'root'. data=folder has it. data 'emoji' (tests.test_errors.emoji) takes: none",
    ),
    ("+foo=1", f"foo: unknown option 'foo'. {HELP}"),
    ("~foo", "~foo: no such option to remove"),
    # a value of the wrong type
    ("steps=many", "steps=many: must be an integer of at least 0"),
    ("model.quantizer.size=many", "model.quantizer.size=many: 'many' is not an integer"),
    ("model.quantizer.size=1.5", "model.quantizer.size=1.5: '1.5' is not an integer"),
    ("model.quantizer.beta=big", "model.quantizer.beta=big: 'big' is not a number"),
    ("model.quantizer.beta=null", "model.quantizer.beta=null: null is not allowed"),
    ("model.quantizer.cosine=maybe", "model.quantizer.cosine=maybe: 'maybe' is not true or false"),
    ("model.quantizer.mode=sotf", "model.quantizer.mode: unknown value 'sotf'. Did you mean 'soft'? Known: a, soft."),
    (
        "model/quantizer=ema model.quantizer.sizes=3",
        "model.quantizer.sizes=3: not a list; write it as 'model.quantizer.sizes=[a,b]'",
    ),
    ("model/quantizer=ema model.quantizer.sizes=[x]", "model.quantizer.sizes=[x]: 'x' is not an integer"),
    (
        "model/quantizer=ema model.quantizer.extra=3",
        "model.quantizer.extra=3: must be a mapping or null; write it as 'model.quantizer.extra={a:1,b:2}'",
    ),
    ("pipeline=sample count=all", "count=all: 'all' is not an integer"),
    ("model.quantizer=ema", "model.quantizer=ema: a quantizer is chosen with model/quantizer=ema"),
    ("model.loss=l1", "model.loss=l1: a loss is chosen with model/loss=l1"),
    # missing values
    ("data=folder", "data.root: data 'folder' (tests.test_errors.folder) needs a value; give data.root=..."),
    ("model/discriminator=null", "model/discriminator=null: write model.discriminator=null to choose none"),
    ("metric=null", "metric=null: write 'metric=[]' to choose none"),
    ("data=null", "data=null: write '~data' to choose none"),
    # syntax errors
    (
        "model.quantizer.sizes=[8,",
        "model.quantizer.sizes=[8,: cannot be read (a bracket is open)",
    ),
    (
        "model.quantizer.sizes=[8, 5, 5] steps=3",
        "model.quantizer.sizes=[8, 5, 5]: the shell splits it at spaces; type 'model.quantizer.sizes=[8, 5, 5]'",
    ),
    (
        "data=folder data.root=my photos",
        "photos: an argument has the form key=value. If it belongs to the one before it, type 'data.root=my photos'. "
        "A flag begins with --, as in --help.",
    ),
    (
        "plugins=[./über.py,b]",
        "plugins=[./über.py,b]: cannot be read ('ü' needs quotes); as a list, type 'plugins=[\"./über.py\",b]'; "
        "as one text, type 'plugins=\"[./über.py,b]\"'",
    ),
    (
        "plugins={a:b=1}",
        "plugins={a:b=1}: cannot be read (not one value); as a mapping, type 'plugins={a:\"b=1\"}'; "
        "as one text, type 'plugins=\"{a:b=1}\"'",
    ),
    (
        "-m run=a=1,b",
        "run=a=1,b: cannot be read ('=' needs quotes); as the values of a sweep, type 'run=\"a=1\",b'; "
        "as one text, type 'run=\"a=1,b\"'",
    ),
    (
        "-m run='\"a, 1\",~'",
        'run="a, 1",~: cannot be read (\'~\' needs quotes); as the values of a sweep, type \'run="a, 1","~"\'; '
        'as one text, type \'run="\\"a, 1\\",~"\'',
    ),
    ("run=a,b", "run=a,b: several values are a sweep, which needs -m; as one text, type 'run=\"a,b\"'"),
    (
        "steps=rang(1,2)",
        "steps=rang(1,2): cannot be read (Unknown function 'rang'. "
        "Available: bool,choice,float,glob,int,interval,range,shuffle,sort,str,tag)",
    ),
    ("ü=1", "ü=1: 'ü' is not the name of an option; python -m vqf.run --help lists them"),
    (
        "quickstat",
        "quickstat: an argument has the form key=value. Did you mean experiment=quickstart? "
        "A flag begins with --, as in --help.",
    ),
    ("zzz", "zzz: an argument has the form key=value. A flag begins with --, as in --help."),
    (
        "model/quantizer.size=3",
        "model/quantizer.size=3: a slash chooses a component, a dot sets an option: write model.quantizer.size=3",
    ),
    ("+steps=5", "+steps=5: this option exists already; remove the +"),
    ("steps=1,2", "steps=1,2: several values are a sweep, which needs -m; write a list as 'steps=[1,2]'"),
    ("-cp /nowhere", "--config-path /nowhere: no such folder"),
    ("--config-dir /nowhere", "--config-dir /nowhere: no such folder"),
    # mistakes in files
    (
        "experiment=stale",
        "experiment=stale: unknown quantizer 'vq_17k'. Did you mean 'vq_16k'? Known: ema, vq, vq_16k.",
    ),
    ("experiment=mistyped", "experiment=mistyped: in experiment/mistyped: model.quantizer.beta: 'big' is not a number"),
]


@pytest.mark.parametrize(("command", "line"), ONE_MISTAKE, ids=[command for command, _ in ONE_MISTAKE])
def test_a_mistake_is_one_line(world: Path, command: str, line: str) -> None:
    assert errors(world, command) == [line]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "steps=5 model/quantizer=ema model.quantizer.decay=0.5 data=folder data.root=x",
        "experiment=quickstart",
        "model/loss=[l1,l2] model.loss.l2.weight=0.5",
        "pipeline=sample count=5",
        "-m model/quantizer=vq,ema seed=range(3)",
        "model/quantizer=vq -m seed=1,2",
        "-m model/quantizer=glob(*) steps=choice(1,2) model.loss.l1.weight=interval(0,1)",
        "experiment=sweep seed=1,2",
        "hydra/launcher=joblib hydra.launcher.n_jobs=1 hydra.run.dir=x",
        "~model/discriminator model.prior=null metric=[] model/loss=[]",
        "--help data=folder",
        "--cfg job data=folder",
        "--hydra-help",
        "--info searchpath",
        "-sc query=bash",
    ],
)
def test_what_is_right_passes(world: Path, command: str) -> None:
    assert errors(world, command) == []


def test_every_mistake_is_reported_at_once(world: Path) -> None:
    assert errors(world, "modle=small stepz=3 model/quantizer=vqq model.quantizer.beta=big seed=1") == [
        "model/quantizer=vqq: unknown quantizer 'vqq'. Did you mean 'vq'? Known: ema, vq, vq_16k.",
        f"modle=small: unknown option 'modle'. Did you mean 'model'? {HELP}",
        f"stepz=3: unknown option 'stepz'. Did you mean 'steps'? {HELP}",
        "model.quantizer.beta=big: 'big' is not a number",
    ]
    assert errors(world, "seed=x steps=y data=folder") == [
        "seed=x: must be an integer of at least 0",
        "steps=y: must be an integer of at least 0",
        "data.root: data 'folder' (tests.test_errors.folder) needs a value; give data.root=...",
    ]
    assert errors(world, "zzz a=[ steps=1") == [
        "zzz: an argument has the form key=value. A flag begins with --, as in --help.",
        "a=[: cannot be read (a bracket is open); as one text, type 'a=\"[\"'",
    ]


def test_every_choice_of_a_sweep_is_checked_before_the_first_job(world: Path) -> None:
    assert errors(world, "-m model/quantizer=vq,emma,vqq steps=1,2,3,many") == [
        "model/quantizer=emma: unknown quantizer 'emma'. Did you mean 'ema'? Known: ema, vq, vq_16k.",
        "model/quantizer=vqq: unknown quantizer 'vqq'. Did you mean 'vq'? Known: ema, vq, vq_16k.",
    ]
    wrong = errors(world, "-m model/quantizer=vq,ema steps=1,2,3,many")
    assert wrong == ["steps=many: must be an integer of at least 0"]
    assert errors(world, "-m model/quantizer=vq,ema model.quantizer.beta=0.5")[0].startswith(
        "model.quantizer.beta: unknown option 'beta'. model/quantizer=vq has it. quantizer 'ema'"
    )


def test_a_typo_in_a_file_is_found_too(world: Path) -> None:
    assert errors(world, "experiment=misspelt") == [
        "model.quantiser: unknown option 'quantiser' in model. Did you mean 'quantizer'? Known: "
        "adversary, conditioner, decoder, discriminator, encoder, loss, prior, projection, quantizer, regularizer.",
        f"stepz: unknown option 'stepz'. Did you mean 'steps'? {HELP}",
    ]


def test_a_file_that_is_no_config_is_named(world: Path) -> None:
    (line,) = errors(world, "experiment=broken")
    assert line.startswith("experiment=broken: while parsing a flow ") and '/experiment/broken.yaml", line 3' in line
    (line,) = errors(world, "experiment=listed")
    assert line == (
        "experiment=listed: In 'experiment/listed': ConfigTypeError raised while composing config: "
        "Cannot merge DictConfig with ListConfig"
    )


def test_an_experiment_without_its_package_is_told_what_it_lacks(world: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("steps: 7\n")
    assert errors(world, f"--config-dir {tmp_path} experiment=mine") == [
        "experiment: the first line of its file must be '# @package _global_'"
    ]


def test_a_folder_of_ones_own_presets_is_searched(world: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsteps: 7\n")
    assert errors(world, f"--config-dir {tmp_path} experiment=mine") == []
    assert "Known: broken, listed, mine, misspelt" in errors(world, f"--config-dir {tmp_path} experiment=main")[0]


def test_flags_may_stand_anywhere() -> None:
    assert flags_first(["a=1", "-m", "b=1,2", "-cd", "x", "c=3"]) == ["-m", "-cd", "x", "a=1", "b=1,2", "c=3"]
    assert flags_first(["a=1", "-cp", "x"]) == ["-cp", f"{Path.cwd()}/x", "a=1"]
    assert flags_first(["--help", "a=1"]) == ["--help", "a=1"]


def test_an_unknown_flag_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        flags_first(["--halp"])
    assert caught.value.code == 2 and "unrecognized arguments: --halp" in capsys.readouterr().err


def test_messages_for_unknown_names() -> None:
    assert closest_match("stepz", ["seed", "steps"]) == "steps" and closest_match("x", ["seed"]) is None
    assert unknown_message("fruit", "aple", ["apple"]) == "unknown fruit 'aple'. Did you mean 'apple'? Known: apple."
    assert unknown_message("fruit", 3, []) == "unknown fruit '3'. Known: none."
    assert unknown_key_message("a.x", ["a.b", "a.c"]) == "unknown option 'x' in a. Known: b, c."
    assert (
        unknown_key_message("b", [*(f"w{i}" for i in range(20)), "a.b"])
        == f"unknown option 'b'. Did you mean 'a.b'? {HELP}"
    )
