"""The registry: from a signature to options on the command line, from a config node to an object."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from tests.support.composing import compose
from vqf import registry
from vqf.errors import UserError
from vqf.registry import (
    KINDS,
    RegistryError,
    build,
    check_options,
    component_names,
    components,
    config_errors,
    find_component,
    flat_component,
    register,
)
from vqf.run import config_dir

pytestmark = pytest.mark.usefixtures("isolated")

EVERY = [component for kind in KINDS for component in components(kind)]


class Toy:
    """Has an option of every type that a config can hold."""

    def __init__(
        self,
        dim: int,
        *,
        bits: int = 10,
        scale: float | None = None,
        hard: bool = True,
        mode: Literal["nearest", "soft"] = "nearest",
        depth: Literal[1, 2] = 1,
        file: Path = Path("a/b"),
        sizes: Sequence[int] = (1, 2),
        pairs: tuple[float, float] = (0.5, 0.9),
        names: list[str] | None = None,
        extra: Mapping[str, float] = {"a": 0.5},
        more: Mapping[str, float] | None = None,
        anything: Any = None,
    ) -> None:
        self.given = {key: value for key, value in locals().items() if key != "self"}


def toy_options(*overrides: str) -> dict[str, Any]:
    register("quantizer", "toy")(Toy)
    return build("quantizer", compose("model/quantizer=toy", *overrides).model.quantizer, dim=8).given


def test_defaults_reach_the_constructor_as_they_were_written() -> None:
    assert toy_options() == {
        "dim": 8,
        "bits": 10,
        "scale": None,
        "hard": True,
        "mode": "nearest",
        "depth": 1,
        "file": Path("a/b"),
        "sizes": (1, 2),
        "pairs": (0.5, 0.9),
        "names": None,
        "extra": {"a": 0.5},
        "more": None,
        "anything": None,
    }


def test_overrides_reach_the_constructor_in_their_types() -> None:
    given = toy_options(
        "model.quantizer.scale=1",
        "model.quantizer.hard=no",
        "model.quantizer.mode=soft",
        "model.quantizer.depth=2",
        "model.quantizer.file=c",
        "model.quantizer.sizes=[3,4,5]",
        "model.quantizer.names=[x,y]",
        "model.quantizer.extra={a:1}",
        "model.quantizer.more={b:2}",
        "model.quantizer.anything={b:[1,{c:2}]}",
    )
    assert given["scale"] == 1.0 and isinstance(given["scale"], float)
    assert (given["hard"], given["mode"], given["depth"], given["file"]) == (False, "soft", 2, Path("c"))
    assert given["sizes"] == (3, 4, 5)
    assert given["names"] == ["x", "y"] and type(given["names"]) is list
    assert given["extra"] == {"a": 1.0} and type(given["extra"]) is dict
    assert given["more"] == {"b": 2} and type(given["more"]) is dict
    assert given["anything"] == {"b": [1, {"c": 2}]} and type(given["anything"]["b"][1]) is dict


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=many", "'many' of type 'str' could not be converted to Integer"),
        ("bits=1.5", "could not be converted to Integer"),
        ("scale=big", "could not be converted to Float"),
        ("hard=perhaps", "not a valid bool"),
        ("hard=99999", "not a valid bool"),
        ("sizes=5", "int is not a ListConfig"),
        ("sizes=[a]", "could not be converted to Integer"),
        ("extra={a:b}", "could not be converted to Float"),
        ("extra=5", "Cannot assign int to dict[str, float]"),
        ("bits=null", "is not Optional"),
        ("depth=x", "could not be converted to Integer"),
    ],
)
def test_types_are_checked_while_composing(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        toy_options(f"model.quantizer.{override}")
    assert message in str(caught.value.__cause__)


def test_a_foreign_callable_registers_unchanged() -> None:
    register("optimizer", "adadelta")(torch.optim.Adadelta)
    config = compose("optimizer=adadelta", "optimizer.rho=0.5").optimizer
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = build("optimizer", config, params=[parameter])
    assert isinstance(optimizer, torch.optim.Adadelta)
    assert optimizer.param_groups[0]["rho"] == 0.5 and optimizer.param_groups[0]["params"] == [parameter]


def test_a_function_is_a_component_too() -> None:
    @register("schedule", "twice")
    def twice(steps: int, *, factor: int = 2) -> int:
        return steps * factor

    assert build("schedule", compose("schedule=twice").schedule, steps=21, optimizer=None) == 42
    assert twice(1) == 2, "the decorator gives back what it was given"


@pytest.mark.parametrize(
    ("kind", "name", "target", "message"),
    [
        ("quantiser", "x", Toy, "unknown component kind 'quantiser'. Did you mean 'quantizer'?"),
        ("quantizer", "Toy-1", Toy, "quantizer name 'Toy-1' is not lower_snake_case"),
        ("quantizer", "bad", lambda *args: None, "quantizer 'bad': *args is not possible; name every parameter"),
        ("quantizer", "bad", lambda **kwargs: None, "quantizer 'bad': *kwargs is not possible; name every parameter"),
        ("quantizer", "bad", lambda name="x": None, "'name' is reserved; rename the parameter"),
        ("quantizer", "bad", lambda defaults="x": None, "'defaults' is reserved; rename the parameter"),
        ("quantizer", "vq", Toy, "test_registry.Toy) clashes with quantizer 'vq' (vqf.quantizers.vq.VectorQuantiz"),
    ],
)
def test_what_cannot_be_registered(kind: str, name: str, target: Callable[..., Any], message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        register(kind, name)(target)
    assert message in str(caught.value)
    assert "bad" not in component_names("quantizer")


def test_an_option_that_no_config_can_hold_is_refused() -> None:
    def holds(dim: int, *, function: Callable[[int], int] = abs) -> None: ...

    with pytest.raises(RegistryError, match="'function' cannot be written in a config"):
        register("quantizer", "holds")(holds)


def test_registering_the_same_class_again_replaces_it() -> None:
    register("quantizer", "toy")(Toy)
    again = type("Toy", (Toy,), {"__module__": Toy.__module__, "__qualname__": Toy.__qualname__})
    register("quantizer", "toy")(again)
    assert type(build("quantizer", {"name": "toy"}, dim=1)) is again


def test_an_annotation_for_type_checkers_only_leaves_its_option_untyped() -> None:
    def lazy(dim: int, *, size: "NotImported" = 3) -> Any:  # type: ignore[name-defined]  # noqa: F821
        return size

    register("quantizer", "lazy")(lazy)
    node = compose("model/quantizer=lazy", "model.quantizer.size=word").model.quantizer
    assert build("quantizer", node, dim=1) == "word"


@pytest.mark.parametrize(
    ("kind", "node", "message"),
    [
        ("quantizer", {"name": "vqq"}, "quantizer: unknown quantizer 'vqq'. Did you mean 'vq'? Known: "),
        ("quantizer", {}, "quantizer: no quantizer is chosen; choose one with model/quantizer=NAME. Known: "),
        ("quantizer", None, "quantizer: no quantizer is chosen; choose one with model/quantizer=NAME. Known: "),
        ("quantizer", "ema", "quantizer=ema: a quantizer is chosen with model/quantizer=ema"),
        ("quantizer", {"name": "vq", "betta": 1}, "quantizer.betta: unknown option 'betta'. Did you mean 'beta'?"),
        ("quantizer", {"name": "vq", "betta": 1}, "(vqf.quantizers.vq.VectorQuantizer) takes: dim: int = 256, "),
        (
            "quantizer",
            {"name": "vq", "beta_placement": "x"},
            "quantizer.beta_placement: unknown value 'x'. Known: commitment, codeb",
        ),
        ("encoder", {"name": "conv", "in_channels": 1}, "encoder.in_channels: the pipeline sets 'in_channels' of enco"),
        ("data", {"name": "folder"}, "data.root: data 'folder' (vqf.data.folder.Folder) needs a value; give data.root"),
        ("data", {"name": "folder", "root": "???"}, "data.root: data 'folder' (vqf.data.folder.Folder) needs a value"),
        (
            "data",
            {"name": "emoji", "root": "x"},
            "data.root: unknown option 'root'. data=folder or pairs or shard_pairs or shards has it. dat",
        ),
        ("data", {"name": "folder", "root": "${nowhere}"}, "data: Interpolation key 'nowhere' not found"),
        ("optimizer", {"name": "timm", "options": 3}, "options=3: must be a mapping or null; write it as 'optimizer"),
        ("pipeline", {"name": "sample", "cuont": 1}, "unknown option 'cuont'. Did you mean 'count'?"),
    ],
)
def test_check_names_the_key_and_the_cure(kind: str, node: Any, message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        check_options(kind, node)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_a_full_config_name_the_key() -> None:
    config = compose("model.quantizer.betta=1", "model.loss.l1.wait=2", "metric.psnr.peak=1", "optimizer.lrr=1")
    mistakes = config_errors(config)
    keys = ["model.quantizer.betta", "model.loss.l1.wait", "metric.psnr.peak", "optimizer.lrr"]
    assert [line.split(":")[0] for line in mistakes] == keys
    assert config_errors(compose()) == []


def test_building_without_a_wired_value_names_the_offered_ones() -> None:
    with pytest.raises(RegistryError, match="'in_channels' has no default; a encoder is built with dim, image_size"):
        build("encoder", {"name": "conv"}, dim=1, image_size=2)


def test_only_what_is_asked_for_is_wired() -> None:
    register("quantizer", "toy")(Toy)
    assert build("quantizer", {"name": "toy"}, dim=8, other=9).given["dim"] == 8


class Refusing:
    def __init__(self, *, how: str) -> None:
        raise {"value": ValueError("no"), "user": UserError("data.root=x: no"), "bug": IndexError("bug")}[how]


@pytest.mark.parametrize(
    ("how", "expected", "message"),
    [
        ("value", RegistryError, "quantizer 'refusing': no"),
        ("user", UserError, "data.root=x: no"),
        ("bug", IndexError, "bug"),
    ],
)
def test_a_constructor_refuses_in_its_own_words_and_bugs_stay_bugs(
    how: str, expected: type[Exception], message: str
) -> None:
    register("quantizer", "refusing")(Refusing)
    with pytest.raises(expected) as caught:
        build("quantizer", {"name": "refusing", "how": how})
    assert type(caught.value) is expected and str(caught.value) == message


def test_several_components_are_nodes_by_name() -> None:
    config = compose("model/loss=[l1,l2]", "model.loss.l2.weight=0.5", "metric=[psnr]")
    assert OmegaConf.to_container(config.model.loss) == {
        "l1": {"name": "l1", "weight": 1.0},
        "l2": {"name": "l2", "weight": 0.5},
    }
    assert list(config.metric) == ["psnr"]


class Draw:
    def __init__(self, config: Any, run_dir: Path, *, count: int = 4, label: str | None = None) -> None:
        self.given = (count, label)


def test_options_of_a_pipeline_are_top_level_keys() -> None:
    register("pipeline", "draw")(Draw)
    config = compose("pipeline=draw", "count=16")
    assert (config.pipeline, config.count, config.label) == ({"name": "draw"}, 16, None)
    node = flat_component("pipeline", config)
    assert OmegaConf.to_container(node) == {"name": "draw", "count": 16, "label": None}
    assert build("pipeline", node, config=config, run_dir=Path()).given == (16, None)
    assert "label" not in compose()


def test_a_component_brings_its_defaults() -> None:
    register("pipeline", "draw", defaults=[{"override /sampler": "toy"}, {"override /model/loss": ["l2"]}])(Draw)
    register("sampler", "toy")(Toy)
    config = compose("pipeline=draw", "count=2")
    assert (config.sampler.name, list(config.model.loss), config.count) == ("toy", ["l2"], 2)
    assert compose("pipeline=draw", "model/loss=[l1]").model.loss.keys() == {"l1"}, "the command line wins"


def test_swapping_a_component_leaves_no_stale_option_behind() -> None:
    config = compose("model.quantizer.codebook_size=64", "model/quantizer=vq_16k").model.quantizer
    assert config.codebook_size == 64
    swapped = compose("model=vqvae", "model/quantizer=ema").model.quantizer
    assert set(swapped) == {"name", *registry.find_component("quantizer", "ema").options}


def test_a_component_swapped_in_for_null_wins() -> None:
    assert compose("model=vqvae").model.discriminator is None
    assert compose("model=vqvae", "model/discriminator=patchgan").model.discriminator.name == "patchgan"


def test_yaml_files_do_not_bear_the_name_of_a_component() -> None:
    for kind, facts in KINDS.items():
        files = {path.stem for path in (config_dir() / facts.group).glob("*.yaml")}
        assert not files & set(component_names(kind)), "Hydra would match one against the other"


def test_presets_that_set_values_stand_first_in_their_own_list() -> None:
    for path in (config_dir() / "model").glob("*.yaml"):
        assert OmegaConf.load(path).defaults[0] == "_self_", f"{path.name}: its nulls would beat the command line"


@pytest.mark.parametrize("component", EVERY, ids=lambda each: f"{each.kind}-{each.name}")
def test_every_default_survives_the_config(component: registry.Component) -> None:
    needed = {key: each for key, each in component.options.items() if each.default is each.empty}
    missing = {key: {"a": 1} if "Mapping" in str(each.annotation) else "x" for key, each in needed.items()}
    options = check_options(component.kind, {**registry._typed_options(component), **missing, "name": component.name})
    defaults = {key: each.default for key, each in component.options.items() if key not in missing}
    assert {key: value for key, value in options.items() if key not in missing} == defaults


def test_what_is_stored_is_shared_and_never_changed() -> None:
    store = ConfigStore.instance().repo["model"]["quantizer"]
    assert copy.deepcopy(store)["vq.yaml"] is store["vq.yaml"], "or every listed group copies the whole store"
    before = OmegaConf.to_container(store["vq.yaml"].node)
    assert compose("model/quantizer=vq", "model.quantizer.dim=3").model.quantizer.dim == 3
    assert OmegaConf.to_container(store["vq.yaml"].node) == before
    assert compose("model/quantizer=vq").model.quantizer.dim == before["dim"]  # type: ignore[index, call-overload]


def test_launchers_can_pickle_what_is_registered() -> None:
    register("quantizer", "toy")(Toy)
    repo = pickle.loads(pickle.dumps(copy.deepcopy(ConfigStore.instance().repo)))
    assert repo["model"]["quantizer"]["toy.yaml"].node.bits == 10


class Base:
    def __init__(self, dim, *, size: int = 3, rate: float = 0.5):
        self.dim, self.size, self.rate = dim, size, rate


class Middle(Base):
    def __init__(self, *, extra: str = "x", rate: float = 0.25, **options):
        super().__init__(rate=rate, **options)
        self.extra = extra


class Leaf(Middle):
    def __init__(self, *, more: bool = False, **options):
        super().__init__(**options)
        self.more = more


def test_options_of_the_base_class_need_not_be_repeated() -> None:
    register("quantizer", "leaf")(Leaf)
    component = find_component("quantizer", "leaf")
    assert component.wired == ("dim",)
    assert [(key, each.default) for key, each in component.options.items()] == [
        ("more", False),
        ("extra", "x"),
        ("rate", 0.25),
        ("size", 3),
    ]
    built = build("quantizer", compose("model/quantizer=leaf", "model.quantizer.size=7").model.quantizer, dim=8)
    assert (built.dim, built.size, built.rate, built.extra, built.more) == (8, 7, 0.25, "x", False)
    with pytest.raises(ConfigCompositionException):  # typed as in the base class
        compose("model/quantizer=leaf", "model.quantizer.size=large")


def test_options_that_no_base_class_takes_are_refused() -> None:
    class Open(torch.nn.Module):
        def __init__(self, **options):
            super().__init__(**options)

    with pytest.raises(RegistryError, match=r"^quantizer 'open': \*args is not possible; name every parameter"):
        register("quantizer", "open")(Open)
