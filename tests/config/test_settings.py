"""Options of every run: every one has a type and range, wrong values and unknown keys are reported."""

import math
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.support.composing import compose
from vqf.config.compose import config_dir
from vqf.config.settings import OPTIONS, SECTIONS, check_config, fill_missing_groups
from vqf.errors import UserError
from vqf.registry import KINDS, component_names, find_component, register


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose()


def mistakes(config: DictConfig, **values: Any) -> list[str]:
    """The messages about a config with some values replaced."""
    config = config.copy()
    with open_dict(config):
        for key, value in values.items():
            OmegaConf.update(config, key.replace("__", "."), value, merge=False)
    try:
        check_config(config)
    except UserError as error:
        return str(error).splitlines()
    return []


def leaves(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix[:-1]}
    return {leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}{key}.")}


def test_every_option_of_the_config_has_a_type() -> None:
    own = OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml"))
    assert isinstance(own, dict)
    options = {key: value for key, value in own.items() if key not in ("defaults", "hydra", *SECTIONS)}
    assert leaves(options) == set(OPTIONS)
    for name in SECTIONS:
        assert leaves(own[name]) <= set(OPTIONS)


def test_the_default_config_is_valid(composed: DictConfig) -> None:
    assert mistakes(composed) == []


SIZE = "must be an integer from 1 to 65,536 or a list of 2, each an integer from 1 to 65,536"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("steps", "many", "steps=many: must be an integer of at least 0"),
        ("steps", 1.5, "steps=1.5: must be an integer of at least 0"),
        ("steps", True, "steps=true: must be an integer of at least 0"),
        ("steps", None, "steps=null: must be an integer of at least 0"),
        ("steps", "???", "steps: Missing mandatory value: steps; give steps=..."),
        ("steps", "${stepz}", "steps: Interpolation key 'stepz' not found; give steps=..."),
        ("steps", -1, "steps=-1: must be an integer of at least 0"),
        ("batch_size", 0, "batch_size=0: must be an integer of at least 1"),
        ("steps", 10**21, "steps=1000000000000000000000: must be an integer of at least 0, within 64 bits"),
        ("clip", math.inf, "clip=inf: must be a number above 0 or null, and finite"),
        ("minutes", math.nan, "minutes=nan: must be a number in (0, 10,000,000] or null, and finite"),
        ("image_size", "big", f"image_size=big: {SIZE}"),
        ("image_size", [64, "x"], f"image_size=[64,x]: {SIZE}"),
        ("image_size", [64, 0.5], f"image_size=[64,0.5]: {SIZE}"),
        ("image_size", [], f"image_size=[]: {SIZE}"),
        ("image_size", [8, 8, 3], f"image_size=[8,8,3]: {SIZE}"),
        ("image_size", 0, f"image_size=0: {SIZE}"),
        ("compile", "maybe", "compile=maybe: must be true or false"),
        ("compile", 1, "compile=1: must be true or false"),
        ("device", 0, "device=0: must be a string"),
        ("threads", 0, "threads=0: must be auto or an integer from 1 to 4,096"),
        ("threads", "atuo", "threads=atuo: must be auto or an integer from 1 to 4,096"),
        ("clip", "x", "clip=x: must be a number above 0 or null"),
        ("clip", -1.0, "clip=-1.0: must be a number above 0 or null"),
        ("ema", 1, "ema=1: must be a number in [0, 1) or null"),
        ("worker_timeout", 0, "worker_timeout=0: must be a number from 1 to 1,000,000"),
        ("run", 3, "run=3: must be a path or null"),
        ("run", "nowhere", "run=nowhere: no such folder in {cwd}"),
        ("resume", "nowhere", "resume=nowhere: no such folder in {cwd}"),
        ("resume", None, "resume=null: must be true or false or a path"),
        ("checkpoint.every", 0, "checkpoint.every=0: must be an integer of at least 1"),
        (
            "nonfinite.action",
            "skipp",
            "nonfinite.action=skipp: unknown value 'skipp'. Did you mean 'skip'? Known: stop, skip, rollback.",
        ),
        ("checkpoint.on_failure", "wait", "checkpoint.on_failure=wait: unknown value 'wait'. Known: stop, continue."),
        ("evaluate.count", 0, "evaluate.count=0: must be an integer of at least 1 or null"),
        ("stage2.steps", "x", "stage2.steps=x: must be an integer of at least 0"),
        ("plugins", 3, "plugins=3: must be a string or a list, each a string"),
        (
            "checkpoint",
            5,
            "checkpoint=5: 'checkpoint' is a group of options; set one of them, as in checkpoint.background=...",
        ),
        ("stepz", 5, "stepz: unknown option 'stepz'. Did you mean 'steps'? python -m vqf.run --help lists them."),
        ("log.evry", 5, "log.evry: unknown option 'evry' in log. Did you mean 'every'? Known: every."),
        (
            "count",
            5,
            "count: unknown option 'count'. Did you mean 'evaluate.count'? python -m vqf.run --help lists them.",
        ),
    ],
)
def test_a_wrong_value_is_reported(
    composed: DictConfig, key: str, value: Any, line: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistakes(composed, **{key.replace(".", "__"): value}) == [line.format(cwd=tmp_path)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("image_size", [64, 96]),
        ("device", "cuda:1"),
        ("clip", 1),
        ("ema", 0.999),
        ("run", "."),
        ("run_dir", "not/there/yet"),
        ("resume", True),
        ("resume", "."),
        ("evaluate.count", 16),
        ("plugins", "my_package"),
    ],
)
def test_a_right_value_passes(composed: DictConfig, key: str, value: Any) -> None:
    assert mistakes(composed, **{key.replace(".", "__"): value}) == []


def test_every_mistake_has_its_line(composed: DictConfig) -> None:
    lines = mistakes(
        composed, steps=0.5, typo=1, model__quantizer__betta=1, stage2__optimizer__lrr=1, model__typo={"name": "x"}
    )
    assert {line.split(":")[0] for line in lines} == {
        *("typo", "model.typo", "steps=0.5", "model.quantizer.betta", "stage2.optimizer.lrr")
    }
    assert len(lines) == 5


def test_a_reference_to_a_wrong_value_is_not_reported_again(composed: DictConfig) -> None:
    assert OmegaConf.is_interpolation(composed.stage2, "steps")
    assert len(mistakes(composed, steps="many")) == 1


@pytest.mark.usefixtures("isolated")
def test_a_pipeline_may_not_have_an_option_of_every_run() -> None:
    class Greedy:
        def __init__(self, config: DictConfig, *, steps: int = 3, run: int = 4, count: int = 5) -> None: ...

    register("pipeline", "greedy")(Greedy)
    lines = [line for line in mistakes(compose("pipeline=greedy")) if "every run has an option" in line]
    assert sorted(line.split("option ")[1] for line in lines) == [
        "'run'; rename this one",
        "'steps'; rename this one",
    ]


@pytest.mark.parametrize("name", component_names("pipeline"))
def test_options_of_the_pipelines_differ_from_those_of_every_run(name: str) -> None:
    needed = [each.name for each in find_component("pipeline", name).options.values() if each.default is each.empty]
    assert mistakes(compose(f"pipeline={name}", *(f"{option}=x" for option in needed))) == []


def presets() -> list[str]:
    """Every YAML file of conf/ as it is chosen: experiment=quickstart, model/quantizer=vq_16k."""
    files = (path.relative_to(config_dir()).with_suffix("") for path in config_dir().rglob("*/*.yaml"))
    return sorted(f"{file.parent.as_posix()}={file.name}" for file in files if file.parts[0] != "hydra")


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_valid(preset: str) -> None:
    several = any(facts.multiple for facts in KINDS.values() if preset.startswith(f"{facts.group}="))
    group, name = preset.split("=")
    assert mistakes(compose(f"{group}=[{name}]" if several else preset)) == []


def test_what_is_not_chosen_is_null_or_empty() -> None:
    config = fill_missing_groups(compose("model=vqvae", "model/loss=[]", "metric=[]", "~data"))
    assert config.data is None and config.model.discriminator is None
    assert config.model.loss == {} and config.metric == {}
    for facts in KINDS.values():
        place, _, key = facts.group.replace("/", ".").rpartition(".")
        assert key in (OmegaConf.select(config, place) if place else config)
