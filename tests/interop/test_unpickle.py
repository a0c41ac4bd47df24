"""Untrusted pickles: weights are read, code does not run. Every payload would create a file if it ran."""

import argparse
import builtins
import collections
import copyreg
import datetime
import functools
import io
import operator
import os
import pickle
import subprocess
import sys
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError
from vqf.interop.unpickle import OPAQUE_NAMES, OpaqueObject, OpaqueType, RestrictedUnpickler, load_untrusted


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def saved(path: Path, found: Any) -> Path:
    torch.save(found, path)
    return path


def written(path: Path, pickled: bytes) -> Path:
    """A file in torch's zip format with a given pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3")
    return path


def callback(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a package that is not installed when the file is read."""
    for name in ("lightning_of_old", "lightning_of_old.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    made = type("ModelCheckpoint", (), {"__module__": "lightning_of_old.callbacks"})
    sys.modules["lightning_of_old.callbacks"].ModelCheckpoint = made  # type: ignore[attr-defined]
    return made


def test_a_checkpoint_of_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = callback(monkeypatch)
    object_, state = made(), {"best": torch.tensor(0.5)}
    object_.path = Path("x")
    weights = collections.OrderedDict(
        transposed=torch.randn(3, 4).t(),
        part=torch.arange(10.0)[2:5],
        parameter=torch.nn.Parameter(torch.randn(2)),
        half=torch.randn(3).half(),
        bfloat=torch.randn(3).bfloat16(),
        count=torch.tensor(3),
        flags=torch.tensor([True, False]),
        nothing=torch.empty(0, 3),
    )
    weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    args = argparse.Namespace(lr=1.0)
    whole = {"state_dict": weights, "callbacks": {made: state}, "hyper": object_, "args": args, "classes": {1, 2}}
    path = saved(tmp_path / "last.ckpt", whole)
    monkeypatch.undo()
    found = load_untrusted(path)
    assert list(found["state_dict"]) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(found["state_dict"][name], tensor), name
        assert found["state_dict"][name].dtype == tensor.dtype
    assert [type(each).__name__ for each in found["callbacks"]] == ["OpaqueType"]
    assert next(iter(found["callbacks"].values()))["best"] == 0.5
    assert "lightning_of_old" not in sys.modules
    assert "lightning_of_old.callbacks.ModelCheckpoint" in caplog.text


def test_what_lightning_saves_besides_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nested and typed OmegaConf settings, dates, numpy arrays and numbers, types, containers."""
    caplog.set_level("INFO")

    settings = OmegaConf.create({"model": {"params": {"lr": 1e-4, "sizes": [1, 2], "name": "vq"}}, "none": None})
    typed = DictConfig({"a": 1}, key_type=str, element_type=int, ref_type=dict[str, int])
    weights = {"a": torch.randn(3)}
    whole = {
        "hyper_parameters": settings,
        "typed": typed,
        "union": typing.Optional[int],  # noqa: UP045
        "generic": typing.Dict[str, int],  # noqa: UP006
        "when": datetime.datetime(2021, 4, 3, tzinfo=datetime.UTC),
        "took": datetime.timedelta(hours=3),
        "array": np.arange(5.0),
        "texts": np.array(["a", "b"]),
        "scalar": np.float64(3),
        "kinds": [dict, list, int, str, float, set, tuple, bool, object],
        "set": {1, 2},
        "frozen": frozenset({1}),
        "queue": collections.deque([1]),
        "state": collections.defaultdict(dict, {0: {"exp_avg": torch.ones(2)}}),
        "path": Path("x"),
        "state_dict": weights,
    }
    found = load_untrusted(saved(tmp_path / "last.ckpt", whole))
    assert torch.equal(found["state_dict"]["a"], weights["a"])
    assert torch.equal(found["state"][0]["exp_avg"], torch.ones(2))
    assert type(found["state"]).__mro__[1] is dict
    for key in ("hyper_parameters", "typed", "when", "took", "array", "texts", "scalar", "set", "queue"):
        assert isinstance(found[key], OpaqueObject), key
    assert "omegaconf.dictconfig.DictConfig" in caplog.text


def test_a_checkpoint_with_settings_is_imported(tmp_path: Path) -> None:
    from tests.interop.composing import run
    from tests.parity.peers import vq_model

    state = {
        "state_dict": vq_model(torch.float32).state_dict(),
        "hyper_parameters": OmegaConf.create({"a": {"b": [1]}}),
    }
    run(tmp_path / "run", "pipeline=import", f"path={saved(tmp_path / 'last.ckpt', state)}")
    assert (tmp_path / "run" / "import-report.txt").is_file()


def test_an_opaque_object_never_calls_anything() -> None:
    """An opaque object does not call, index, iterate, compare or read attributes of what a pickle passes to it."""

    class Trap:
        def __getattribute__(self, name: str) -> typing.Any:
            if name == "__class__":  # which nothing can be hidden in
                return Trap
            raise AssertionError(f"asked for {name}")

        def __call__(self, *_: object) -> None:
            raise AssertionError("called")

        def __iter__(self) -> None:
            raise AssertionError("iterated")

        def __getitem__(self, _: object) -> None:
            raise AssertionError("indexed")

        def __eq__(self, _: object) -> bool:
            raise AssertionError("compared")

        def __hash__(self) -> int:
            raise AssertionError("hashed")

    unpickler = RestrictedUnpickler.__new__(RestrictedUnpickler)
    unpickler.opaque_types = {}
    trap: typing.Any = Trap()
    for full in OPAQUE_NAMES | {"typing.Any", "omegaconf.dictconfig.DictConfig"}:
        made = RestrictedUnpickler.find_class(unpickler, *full.rsplit(".", 1))
        assert isinstance(made, OpaqueType)
        for arguments in ((), (trap,), (trap, trap, trap)):
            opaque = made(*arguments)
            assert isinstance(opaque, OpaqueObject)
            opaque.__setstate__(trap)
            opaque.append(trap), opaque.extend(trap), opaque.add(trap)
            opaque[trap] = trap
            assert isinstance(made.__new__(made, *arguments), OpaqueObject)


def test_a_file_of_before_zip_is_refused_in_plain_letters(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"when": datetime.datetime(2020, 1, 1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError) as caught:
        load_untrusted(path)
    assert str(caught.value) == (
        f"{path}: not a weight file: it names 'datetime.datetime', which is neither a tensor nor a plain container; "
        "save its state_dict alone with torch.save"
    )
    assert str(caught.value).isprintable()


def test_plain_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.bin", {"a": torch.ones(2)})
    assert torch.equal(load_untrusted(path)["a"], torch.ones(2))


def partial_of_system(path: str) -> Any:
    return Calls(functools.partial, os.system, f"touch {path}")


def through_a_method(path: str) -> Any:
    """An attribute of a class that would become an opaque object, by a nested name."""
    return Calls(types.SimpleNamespace, f"touch {path}")


PAYLOADS: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda path: Calls(os.system, f"touch {path}"), f"{os.system.__module__}.system"),
    "eval": (lambda path: Calls(builtins.eval, f"open({path!r}, 'w')"), "builtins.eval"),
    "exec": (lambda path: Calls(builtins.exec, f"open({path!r}, 'w')"), "builtins.exec"),
    "open": (lambda path: Calls(io.open, path, "w"), "io.open"),
    "getattr": (lambda path: Calls(getattr, Path, "unlink"), "builtins.getattr"),
    "import": (lambda path: Calls(__import__, "os"), "builtins.__import__"),
    "partial": (partial_of_system, "functools.partial"),
    "Popen": (lambda path: Calls(subprocess.Popen, ["touch", path]), "subprocess.Popen"),
    "copyreg": (lambda path: Calls(copyreg._reconstructor, dict, dict, {}), "copyreg._reconstructor"),
    "extension": (lambda path: Calls(copyreg.add_extension, "os", "system", 1), "copyreg.add_extension"),
    "namespace": (through_a_method, "types.SimpleNamespace"),
    "attrgetter": (lambda path: Calls(operator.attrgetter, "system"), "operator.attrgetter"),
    "itemgetter": (lambda path: Calls(operator.itemgetter, 0), "operator.itemgetter"),
    "methodcaller": (lambda path: Calls(operator.methodcaller, "system", "x"), "operator.methodcaller"),
    "compile": (lambda path: Calls(builtins.compile, "1", "", "eval"), "builtins.compile"),
    "map": (lambda path: Calls(map, os.system, [f"touch {path}"]), "builtins.map"),
    "setattr": (lambda path: Calls(setattr, Path, "a", 1), "builtins.setattr"),
    "numpy.load": (lambda path: Calls(np.load, path), "numpy.load"),
    "hints": (lambda path: Calls(typing.get_type_hints, Path), "typing.get_type_hints"),
    "storage": (
        lambda path: Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {path}"))),
        "torch.storage._load_from_bytes",
    ),
    "torch.load": (lambda path: Calls(torch.load, path), "torch.serialization.load"),
    "hub": (lambda path: Calls(torch.hub.load, path, "x"), "torch.hub.load"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a state dict"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_code_is_refused_by_name(name: str, nested: bool, tmp_path: Path) -> None:
    make, refused = PAYLOADS[name]
    touched = tmp_path / "touched"
    payload = make(str(touched))
    weights = {"a": torch.ones(2), "b": [{"c": payload}]}
    path = saved(tmp_path / "last.ckpt", {"state_dict": weights} if nested else payload)
    with pytest.raises(UserError) as caught:
        load_untrusted(path)
    assert not touched.exists()
    assert str(caught.value) == (
        f"{path}: names '{refused}', which no weight file needs and which could run code: refused"
    )


PROTOCOL = b"\x80\x02"
SYSTEM = b"cposix\nsystem\n"


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        # GLOBAL by the two other opcodes, and the instance opcodes
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "names 'posix.system'"),
        (PROTOCOL + b"(iposix\nsystem\n.", "names 'posix.system'"),
        (PROTOCOL + b"(" + SYSTEM + b"X\x01\x00\x00\x00xo.", "names 'posix.system'"),
        # under the names of Python 2
        (PROTOCOL + b"c__builtin__\neval\n.", "names 'builtins.eval'"),
        (PROTOCOL + b"ccopy_reg\n_reconstructor\n.", "names 'copyreg._reconstructor'"),
        # a function of the pickle reader's own module, and a path through a class
        (PROTOCOL + b"cvqf.interop.unpickle\n_tensor\n.", "names 'vqf.interop.unpickle._tensor'"),
        (b"\x80\x04\x8c\x03lib\x8c\x12Class.__init__.x\x93.".replace(b"\x12", b"\x10"), "names 'lib.Class.__init__.x'"),
        # BUILD on what may be called, on an opaque class, and on a container's class
        (PROTOCOL + b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "may not change"),
        (PROTOCOL + b"clib\nClass\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "damaged"),
        (PROTOCOL + b"ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "may not change"),
        # a reference that is no storage, a storage that is not there, and an unknown extension
        (PROTOCOL + b"X\x01\x00\x00\x00aQ.", "damaged"),
        (PROTOCOL + b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01tQ.", "damaged"),
        (PROTOCOL + b"\x82\x7f.", "damaged"),
        (b"", "damaged"),
    ],
)
def test_pickles_by_hand(pickled: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        load_untrusted(written(tmp_path / "last.ckpt", pickled))


def test_an_opaque_object_takes_everything_and_does_nothing(tmp_path: Path) -> None:
    """Called, built, filled: a class of a package, with arguments and a state that would change it if it could."""
    pickled = (
        PROTOCOL
        + b"clib\nClass\n(X\x01\x00\x00\x00atR"  # Class("a")
        + b"}X\x0c\x00\x00\x00__setstate__K\x01sb"  # state: {"__setstate__": 1}
        + b"(K\x01e."  # append
    )
    found = load_untrusted(written(tmp_path / "last.ckpt", pickled))
    assert type(found).__name__ == "Class"
    assert not hasattr(found, "__dict__") or vars(found) == {}


def test_a_mapping_cannot_bring_methods_of_its_own(tmp_path: Path) -> None:
    """BUILD sets attributes on an OrderedDict; `items` would be one."""
    opaque = b"clib\nClass\n0"  # torch's own reader refuses it, so vqf's is used
    filled = b"ccollections\nOrderedDict\n)RX\x01\x00\x00\x00aK\x02s"
    found = load_untrusted(
        written(tmp_path / "last.ckpt", PROTOCOL + opaque + filled + b"}X\x05\x00\x00\x00itemsK\x01sb.")
    )
    assert list(found.items()) == [("a", 2)]


def tensor_of(size: bytes, offset: bytes = b"K\x00", stride: bytes = b"K\x01\x85") -> bytes:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    opaque = b"clib\nClass\n0"  # torch's own reader refuses it, so vqf's is used
    arguments = b"(" + storage + offset + size + stride + b"\x89ccollections\nOrderedDict\n)Rt"
    return PROTOCOL + opaque + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."


def with_storage(path: Path, pickled: bytes, bytes_of_it: int = 16, compression: int = zipfile.ZIP_STORED) -> Path:
    written(path, pickled)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("archive/data/0", b"\x00" * bytes_of_it)
    return path


def test_a_tensor_inside_its_storage(tmp_path: Path) -> None:
    found = load_untrusted(with_storage(tmp_path / "last.ckpt", tensor_of(b"K\x03\x85", b"K\x01")))
    assert torch.equal(found, torch.zeros(3))


@pytest.mark.parametrize(
    ("pickled", "size", "compression", "words"),
    [
        (tensor_of(b"K\x05\x85"), 16, zipfile.ZIP_STORED, "in a storage of 4 numbers"),
        (tensor_of(b"K\x03\x85", offset=b"K\x02"), 16, zipfile.ZIP_STORED, "out of bounds"),
        (tensor_of(b"K\x03\x85", stride=b"K\x02\x85"), 16, zipfile.ZIP_STORED, "out of bounds"),
        (tensor_of(b"J\xff\xff\xff\xff\x85"), 16, zipfile.ZIP_STORED, "damaged"),
        (tensor_of(b"J\xff\xff\xff\x7f\x85", stride=b"K\x00\x85"), 16, zipfile.ZIP_STORED, "in a storage of 4 numbers"),
        (tensor_of(b"K\x03\x85"), 12, zipfile.ZIP_STORED, "not of the size that the pickle says"),
        (tensor_of(b"K\x03\x85"), 16, zipfile.ZIP_DEFLATED, "not of the size that the pickle says"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage(
    pickled: bytes, size: int, compression: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        load_untrusted(with_storage(tmp_path / "last.ckpt", pickled, size, compression))


@pytest.mark.parametrize("content", [b"", b"\x80\x02K\x01.", b"<html>not found</html>"])
def test_what_is_no_file_of_weights(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a weight file"):
        load_untrusted(path)


def test_a_truncated_download(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.ckpt", {"a": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="not a weight file"):
        load_untrusted(path)


def test_nothing_of_the_restricted_reader_is_torch_s_unrestricted_one() -> None:
    source = Path(load_untrusted.__code__.co_filename).read_text()
    assert "weights_only=False" not in source and "pickle.load" not in source
