"""Files in place of weights are named by their content, with the cure; torch's own advice never reaches a user."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqf.errors import UserError
from vqf.interop.checkpoint_file import open_checkpoint_file
from vqf.networks.file_content import describe_content, is_safetensors
from vqf.networks.weights import check_dtypes, nonfinite_names, read_weights

WEIGHTS = {"a": torch.randn(100, 10)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def torch_file(path: Path, legacy: bool = False) -> bytes:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def safetensors_file(path: Path) -> bytes:
    save_file(WEIGHTS, path)
    return path.read_bytes()


def lies(offset: object) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offset}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, "a pointer of Git LFS, which stands for the file; run git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page (HTML)"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "a web page (HTML)"),
        (b"", "an empty file; download or copy it again"),
        (bytes(5000), "begins with zeros"),
        (b'{"error": "Access denied"}\n', 'JSON text that begins with \'{"error": "Access denied"}\''),
        (b"Not Found\nmore", "text that begins with 'Not Found'"),
        (b"\x1f\x8b\x08\x00", "a gzip archive; unpack it"),
        (bytes(257).replace(b"\0", b"a") + b"ustar", "a tar archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x80\x04K\x01.", "a pickle that torch.save did not write"),
        (b"\x00\x01\x02\xff\xfe\x00\x01\x02", "begins with the bytes 00 01 02 ff fe 00 01 02"),
        (lies("x"), "a damaged safetensors file"),
        (lies([0, 1000]), "bytes of a safetensors file"),
        (struct.pack("<Q", 1000) + b"{" * 1000, "a damaged safetensors file"),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_in_place_of_weights(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    messages = []
    for read in (read_weights, lambda file: open_checkpoint_file(file, None)):
        with pytest.raises(UserError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert words in messages[0]
    assert messages[0] == messages[1] and messages[0].startswith(f"{path}: not a weight file: ")
    assert messages[0].isprintable() and "weights_only" not in messages[0]


def test_half_a_file(tmp_path: Path) -> None:
    for name, whole in {
        "zip.pt": torch_file(tmp_path / "zip.pt"),
        "old.pt": torch_file(tmp_path / "old.pt", legacy=True),
        "x.safetensors": safetensors_file(tmp_path / "x.safetensors"),
    }.items():
        for part in (len(whole) // 2, len(whole) - 4):
            (tmp_path / name).write_bytes(whole[:part])
            with pytest.raises(UserError, match=r"not a weight file: .*(cut short|first .* bytes)") as caught:
                read_weights(tmp_path / name)
            assert "weights_only" not in str(caught.value)
    assert f"the first {part:,} of {len(whole):,} bytes of a safetensors file" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("read.me", "x")
    assert describe_content(tmp_path / "other.zip").startswith("a zip archive; unpack it")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="a TorchScript model; save its weights"):
        read_weights(tmp_path / "script.pt")
    with pytest.raises(UserError, match="a TorchScript model; save its weights"):
        open_checkpoint_file(tmp_path / "script.pt", None)


def test_the_content_decides_not_the_ending(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.ckpt")
    torch.save(WEIGHTS, tmp_path / "weights.safetensors")
    assert is_safetensors(tmp_path / "weights.ckpt") and not is_safetensors(tmp_path / "weights.safetensors")
    for name in ("weights.ckpt", "weights.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], WEIGHTS["a"])
        assert torch.equal(open_checkpoint_file(tmp_path / name, None).tensors["a"], WEIGHTS["a"])


def test_a_pointer_among_the_files_of_a_model(tmp_path: Path) -> None:
    for pointer, other in ((1, 2), (2, 1)):
        (tmp_path / f"model-{pointer}.safetensors").write_bytes(LFS)
        save_file(WEIGHTS, tmp_path / f"model-{other}.safetensors")
        with pytest.raises(UserError, match=rf"model-{pointer}.safetensors: not a weight file: a pointer of Git LFS"):
            open_checkpoint_file(tmp_path, None)


def test_numbers_of_another_kind() -> None:
    expected = {"w": torch.zeros(2), "n": torch.tensor(0)}
    check_dtypes({"w": torch.zeros(2).bfloat16(), "n": torch.tensor(0, dtype=torch.int32)}, expected)
    for dtype, name in ((torch.bool, "bool"), (torch.int8, "int8"), (torch.complex64, "complex64")):
        with pytest.raises(ValueError, match=f"'w' holds {name}, not float32"):
            check_dtypes({"w": torch.zeros(2).to(dtype)}, expected)
    with pytest.raises(ValueError, match="'n' holds float32, not int64"):
        check_dtypes({"n": torch.zeros(())}, expected)


def test_tensors_that_are_not_finite_are_named() -> None:
    tensors = {
        "good": torch.ones(3),
        "count": torch.tensor(3),
        "nan": torch.tensor([0.0, float("nan")]),
        "half": torch.tensor([float("-inf")]).bfloat16(),
        "complex": torch.tensor([complex(0, float("inf"))]),
        "empty": torch.zeros(0),
    }
    assert nonfinite_names(tensors) == ["nan", "half", "complex"]
    assert nonfinite_names({}) == []
