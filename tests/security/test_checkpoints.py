"""Untrusted checkpoints: no code runs, no interpolation is resolved, nothing is written outside."""

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import vqf
from tests.security.canary import PAYLOADS, Canary
from tests.security.conftest import MakeRun, seal
from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer
from vqf.runs import checkpoint_writer
from vqf.runs.checkpoint import latest_checkpoint, open_checkpoint
from vqf.runs.checkpoint_files import MANIFEST, BrokenCheckpointError


def files_of(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_an_unchanged_checkpoint_opens(make_run: MakeRun, tmp_path: Path) -> None:
    path = seal(make_run())
    before = files_of(tmp_path)
    assert isinstance(vqf.load(path), Tokenizer)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("where", ["alone", "in a state"])
def test_optimizers_that_would_run_code(make_run: MakeRun, canary: Canary, payload: str, where: str) -> None:
    path = make_run()
    bad = canary.payloads()[payload]
    torch.save(bad if where == "alone" else {"optimizers": {"model": {"state": {0: bad}}}}, path / "optimizers.pt")
    with pytest.raises(BrokenCheckpointError, match=r"optimizers.pt has no optimizer states"):
        open_checkpoint(seal(path)).load_optimizers()


ADAM = {"state": {}, "param_groups": [{"params": [], "lr": 1e-4}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "it is a list, not a dict"),
        ("text", "it is a str, not a dict"),
        (torch.zeros(2), "it is a Tensor, not a dict"),
        (None, "it is a NoneType, not a dict"),
        ({"optimizers": []}, "'optimizers' is a list"),
        ({"optimizers": {"model": []}}, "'optimizers.model' is a list"),
        ({"optimizers": {"model": {}}}, "'optimizers.model.state' is a NoneType"),
        ({"optimizers": {"model": {**ADAM, "state": [1]}}}, "'optimizers.model.state' is a list"),
        ({"optimizers": {"model": {**ADAM, "state": {0: 1}}}}, "'optimizers.model.state.0' is a int"),
        ({"optimizers": {"model": {**ADAM, "param_groups": {}}}}, "'optimizers.model.param_groups' is a dict"),
        ({"optimizers": {"model": {**ADAM, "param_groups": [1]}}}, "a group in .* is a int"),
        ({"optimizers": {"model": {**ADAM, "param_groups": [{}]}}}, "'params' in .* is a NoneType"),
        ({"schedules": {"model": 3}}, "'schedules.model' is a int"),
    ],
)
def test_optimizers_of_another_structure(make_run: MakeRun, content: Any, words: str) -> None:
    path = make_run()
    torch.save(content, path / "optimizers.pt")
    with pytest.raises(BrokenCheckpointError, match=rf"optimizers.pt has no optimizer states \({words}"):
        open_checkpoint(seal(path)).load_optimizers()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x02.", b"{}", bytes(100)])
def test_optimizers_that_are_another_file(make_run: MakeRun, content: bytes) -> None:
    path = make_run()
    (path / "optimizers.pt").write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"optimizers.pt has no optimizer states") as caught:
        open_checkpoint(seal(path)).load_optimizers()
    assert str(caught.value).isprintable() and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_weights_that_are_a_pickle(make_run: MakeRun, canary: Canary, payload: str) -> None:
    path = make_run()
    torch.save(canary.payloads()[payload], path / "model.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"model.safetensors holds no weights"):
        vqf.load(seal(path))


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with a given header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        tensors({}, length=2**63),
        tensors({}, length=2**40),
        tensors(b"{" * 100_000),
        tensors(entry(0, 2**50, [2**48]), bytes(16)),
        tensors(entry(0, 16, [2**62, 2**62]), bytes(16)),
        tensors(entry(16, 0, [4]), bytes(16)),
        tensors(entry(0, 16, [400]), bytes(16)),
        tensors({**entry(0, 16, [4]), "y": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, bytes(24)),
        tensors({"x": {"dtype": "os.system", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ],
    ids=["empty", "no header", "2^63", "2^40", "nested", "beyond", "overflow", "backwards", "shape", "overlap", "type"],
)
def test_headers_that_lie(make_run: MakeRun, content: bytes) -> None:
    path = make_run()
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"model.safetensors holds no weights"):
        vqf.load(seal(path))


def test_weights_of_another_shape_are_reported_in_a_line(make_run: MakeRun) -> None:
    path = make_run()
    (path / "model.safetensors").write_bytes(tensors(entry(0, 16, [4]), bytes(16)))
    with pytest.raises(UserError, match=r"does not fit the model in config\.yaml \(Missing key") as caught:
        vqf.load(seal(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside", "..", "."])
def test_a_manifest_cannot_name_what_lies_elsewhere(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    path = make_run()
    (path.parent / "outside").write_bytes(b"x")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpointError, match="is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "3", "null", '{"format": 1, "files": [1]}', '{"format": 1, "files": {"state.json": 3}}'),
        '{"format": 1, "files": {"state.json": {"size": "x"}}}',
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_a_manifest_of_anything(make_run: MakeRun, content: str) -> None:
    path = make_run()
    (path / MANIFEST).write_text(content)
    with pytest.raises(BrokenCheckpointError):
        open_checkpoint(path)
    assert latest_checkpoint(path.parents[1]) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kind": "../x", "step": 1}', '{"kind": "stage1", "step": "../../x"}']
)
def test_a_state_of_anything(make_run: MakeRun, content: str) -> None:
    path = make_run()
    (path / "state.json").write_text(content)
    with pytest.raises(BrokenCheckpointError):
        open_checkpoint(seal(path))


@pytest.mark.parametrize(
    "content",
    [
        "a: !!python/object/apply:os.system ['{command}']",
        "!!python/object/new:os.system ['{command}']",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "a: [",
        "[a, b]",
        "",
        "\x00\x01",
    ],
)
def test_a_config_that_is_code_or_none(make_run: MakeRun, canary: Canary, content: str) -> None:
    path = make_run()
    (path / "config.yaml").write_text(content.replace("{command}", canary.command))
    with pytest.raises(UserError):
        vqf.load(seal(path))


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 15))])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "more than 100,000 values, its aliases expanded"),
        (LAUGHS.replace("[x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}"), "more than 100,000 values"),
        ("model: " + "[" * 5000, "or 100 levels"),
        ("a: &a [*a]", "cannot be read"),
        ("x: " + "1" * 5000, "cannot be read"),
        ("x: " + "y" * 3_000_000, "3,000,003 characters"),
        ("? [a]\n: b", "cannot be read"),
    ],
    ids=range(7),
)
def test_a_config_that_expands_or_nests_without_end(make_run: MakeRun, content: str, words: str) -> None:
    path = make_run()
    (path / "config.yaml").write_text(content)
    start = time.monotonic()
    with pytest.raises(BrokenCheckpointError, match=words) as caught:
        vqf.load(seal(path))
    assert time.monotonic() - start < 10
    assert str(caught.value).isprintable()


HUGE = [
    ("model.encoder.blocks", 10**9, "must be an integer from 1 to"),
    ("model.encoder.channels", 10**6, "more than .* numbers, but its weights are .* tensors of"),
    ("model.decoder.channels", 10**6, "more than .* numbers, but its weights are .* tensors of"),
    ("model.quantizer.codebook_size", 10**12, "must be an integer from 1 to"),
    ("model.quantizer.codebook_size", 10**30, "must be an integer from 1 to"),
    ("model.quantizer.dim", -1, "must be an integer from 1 to"),
    ("model.encoder.channels", 0, "step-00000001: "),
    ("model.encoder.multipliers", [1] * 5000, "step-00000001: "),
    ("model.encoder.multipliers", [], "step-00000001: "),
]


@pytest.mark.parametrize(("key", "value", "words"), HUGE, ids=range(len(HUGE)))
def test_a_config_of_a_model_larger_than_its_weights(make_run: MakeRun, key: str, value: Any, words: str) -> None:
    path = make_run(**{key.replace(".", "__"): value})
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        vqf.load(path)
    assert time.monotonic() - start < 10
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_weights_of_another_kind_of_number(make_run: MakeRun, dtype: torch.dtype) -> None:
    path = make_run()
    file = path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "encoder.conv_in.weight": weights["encoder.conv_in.weight"].to(dtype)}, file)
    with pytest.raises(UserError, match=rf"'encoder.conv_in.weight' holds {str(dtype)[6:]}, not float32"):
        vqf.load(seal(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    make_run: MakeRun, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_run()
    vqf.load(path)
    assert not caplog.records
    weights = load_file(path / "model.safetensors")
    weights["decoder.conv_in.bias"][0] = value
    save_file(weights, path / "model.safetensors")
    vqf.load(seal(path))
    assert "model.safetensors: 'decoder.conv_in.bias': not all values are finite" in caplog.text


def test_a_config_names_no_code(make_run: MakeRun, canary: Canary) -> None:
    for place in ("model__encoder___target_", "model__quantizer___target_"):
        path = make_run(place, **{place: "os.system", place.replace("_target_", "command"): canary.command})
        with pytest.raises(UserError, match="_target_: unknown option '_target_'"):
            vqf.load(seal(path))


def test_a_config_imports_nothing(make_run: MakeRun, canary: Canary, tmp_path: Path) -> None:
    plugin = tmp_path / "evil_plugin.py"
    plugin.write_text(f"import os\nos.system({canary.command!r})\n")
    assert isinstance(vqf.load(seal(make_run("one", plugins=[str(plugin)]))), Tokenizer)
    path = make_run("two", plugins=[str(plugin)], model__quantizer__name="theirs")
    with pytest.raises(
        UserError, match=r"unknown quantizer 'theirs'.*it was trained with plugins=\[.*evil_plugin.py\]"
    ):
        vqf.load(seal(path))


@pytest.mark.parametrize("place", ["image_size", "model.encoder.channels", "wandb"])
def test_a_config_resolves_nothing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("VQF_TEST_SECRET", "s3cr3t")
    path = make_run()
    config = OmegaConf.load(path / "config.yaml")
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, place, "${oc.env:VQF_TEST_SECRET}", force_add=True)
    OmegaConf.save(config, path / "config.yaml")
    with pytest.raises(UserError, match=r"contains the interpolation '\$\{oc.env:VQF_TEST_SECRET\}'") as caught:
        vqf.load(seal(path))
    assert "s3cr3t" not in str(caught.value)


def test_a_state_resolves_nothing(make_run: MakeRun) -> None:
    """Its entries about condition tokenizers are used as configs."""
    path = make_run(state={"condition_tokenizers": {"run": {"model": {"encoder": {"name": "${oc.env:HOME}"}}}}})
    with pytest.raises(UserError, match=r"state.json: contains the interpolation '\$\{oc.env:HOME\}'"):
        open_checkpoint(path)


def test_pruning_does_not_follow_links(make_run: MakeRun, tmp_path: Path, config: Any) -> None:
    kept = tmp_path / "mine" / "precious"
    kept.parent.mkdir()
    kept.write_text("x")
    run = make_run().parents[1]
    os.symlink(kept.parent, run / checkpoint_writer.CHECKPOINTS_FOLDER / "step-00000000")
    checkpoint_writer.write_checkpoint(
        run, state={"kind": "stage1", "step": 2}, config=config, weights={}, optimizers={}, keep=1
    )
    assert kept.read_text() == "x"
