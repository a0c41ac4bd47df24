"""Opens untrusted pickles without running code in them.

A pickle may call any function. Here it can call only vqf's replacements of those that make tensors and containers
(`SAFE_FUNCTIONS`). Classes that weights do not need become `OpaqueObject`s, other names are refused, and nothing is
imported.
"""

import math
import pickle
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2 names, which pickle protocol 2 writes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.networks.weights import read_torch_file
from vqf.terminal import log

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {name: each for name, each in vars(torch).items() if isinstance(each, torch.dtype)}
# Names of the standard library and numpy in real checkpoints besides weights: OmegaConf settings with their types,
# dates, arrays of a callback. They become opaque objects, too; none is ever called.
OPAQUE_NAMES = {
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.deque",
    "decimal.Decimal",
    "enum.Enum",
    "fractions.Fraction",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.device",
    "uuid.UUID",
    "_operator.getitem",  # how a type like dict[str, int] is pickled
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int")),
    *(f"builtins.{name}" for name in ("list", "object", "range", "set", "slice", "str", "tuple", "type")),
}
ANSI_COLORS = re.compile(r"\x1b\[[0-9;]*m")
CLASS_NAME = re.compile(r"_*[A-Z]\w*(\._*[A-Z]\w*)*")  # spelled like a class, possibly nested


def load_untrusted(path: Path) -> Any:
    """Read CPU tensors in containers from a file of torch.save.

    Raises:
        UserError: If it is another file, or names a function that no weight file needs.
    """
    try:
        return read_torch_file(path)
    except UserError:
        if not _has_pickle(path):
            raise
    return _load_restricted(path)


def _has_pickle(path: Path) -> bool:
    """Tell whether a file has torch's zip format."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    is_torchscript = any(name.endswith("/constants.pkl") for name in names)
    return any(name.endswith("/data.pkl") for name in names) and not is_torchscript


def _load_restricted(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            unpickler = RestrictedUnpickler(archive)
            content = unpickler.load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: damaged, or not a weight file ({_first_line(error)})") from error
    if unpickler.opaque_types:
        log.info("%s: not loaded, since weights do not need them: %s", path, ", ".join(sorted(unpickler.opaque_types)))
    return content


class OpaqueType(type):
    """Metaclass of classes that are not loaded."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        opaque: Any = cls
        return object.__new__(opaque)  # without __init__: the arguments are the pickle's

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"a pickle may not change {cls.__qualname__}")


class OpaqueObject(metaclass=OpaqueType):
    """An object that ignores its state and items."""

    def __new__(cls, *args: Any, **options: Any) -> "OpaqueObject":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class SafeFunction:
    """A function that a pickle may call, without attributes that it could set."""

    __slots__ = ("__function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__function = function

    def __call__(self, *args: Any) -> Any:
        return self.__function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle may not change the functions that it calls")


class PlainDict(dict[Any, Any]):
    """An OrderedDict that ignores attributes set by a pickle."""

    def __setstate__(self, state: Any) -> None: ...


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} in a storage of {flat.numel()} numbers")
    return flat.as_strided(size, stride, offset)  # raises if it reaches beyond the storage


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _empty_defaultdict(*_: Any) -> PlainDict:
    return PlainDict()


SAFE_FUNCTIONS = {
    "collections.OrderedDict": SafeFunction(PlainDict),
    "collections.defaultdict": SafeFunction(_empty_defaultdict),
    "torch.Size": SafeFunction(tuple),
    "torch._utils._rebuild_tensor": SafeFunction(_tensor),
    "torch._utils._rebuild_tensor_v2": SafeFunction(_tensor),
    "torch._utils._rebuild_parameter": SafeFunction(_parameter),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads torch's zip format."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self.archive, self.root = archive, pickled.removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        self.opaque_types: dict[str, OpaqueType] = {}
        super().__init__(archive.open(pickled))

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of a global.

        Raises:
            UserError: If it has none.
        """
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in SAFE_FUNCTIONS:
            return SAFE_FUNCTIONS[full]
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        standard = module.partition(".")[0] in sys.stdlib_module_names
        if full in OPAQUE_NAMES or ((module == "typing" or not standard) and CLASS_NAME.fullmatch(name)):
            return self.opaque_types.setdefault(full, OpaqueType(name, (OpaqueObject,), {}))
        raise UserError(f"names '{full}', which no weight file needs and which could run code: refused")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        if key not in self.storages:
            record = self.archive.getinfo(f"{self.root}data/{key}")
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is not of the size that the pickle says")
            data = bytearray(self.archive.read(record))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _first_line(error: Exception) -> str:
    plain = ANSI_COLORS.sub("", str(error))
    return f"{type(error).__name__}: {(plain.splitlines() or [''])[0][:200]}"
