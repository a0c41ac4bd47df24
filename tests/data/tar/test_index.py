import io
import logging
import os
import pickle
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.packing import pack
from vqf.data.images.decode import UnreadableError
from vqf.data.tar import index as tar_index
from vqf.data.tar import reader as tar_reader
from vqf.data.tar.index import build_index, load_index
from vqf.data.tar.members import split_member_name
from vqf.data.tar.reader import TarReader
from vqf.errors import UserError

MEMBERS = [("a.jpg", b"x" * 700), ("a.cls", b"3"), ("sub/b.left.PNG", bytes(range(256)) * 5), ("c.txt", b"")]


def contents(path):
    """Read every member as the index says."""
    index = build_index(path)
    tars = TarReader([path])
    return {f"{m.key}.{m.extension}": tars.read(0, m.offset, m.size, m.crc) for m in index.members}


def worded(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_members_are_read_where_they_lie(tmp_path):
    path = pack(tmp_path / "x.tar", MEMBERS)
    assert contents(path) == {name.replace("PNG", "png"): content for name, content in MEMBERS}
    index = build_index(path)
    assert index.intact
    assert [(m.key, m.extension, m.text) for m in index.members] == [
        ("a", "jpg", None),
        ("a", "cls", "3"),
        ("sub/b", "left.png", None),
        ("c", "txt", None),
    ]
    assert [m.crc for m in index.members] == [zlib.crc32(content) for _, content in MEMBERS]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_and_what_is_no_file(tmp_path, form):
    path, long = tmp_path / "x.tar", "d" * 60 + "/" + "n" * 90 + ".png"
    with tarfile.open(path, "w:", format=form) as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in (f"./{long}", "._hidden.png", "no_ending"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"12345"))
    assert contents(path) == {long: b"12345"}
    assert build_index(path).intact


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=1500), max_size=6), st.data())
def test_truncation_anywhere_is_detected(tmp_path_factory, parts, data):
    path = pack(tmp_path_factory.mktemp("cut") / "x.tar", [(f"{i}.bin", each) for i, each in enumerate(parts)])
    whole = build_index(path)
    assert whole.intact
    end = max((-(-(m.offset + m.size) // 512) * 512 for m in whole.members), default=0)
    length = data.draw(st.integers(0, end + 511))
    os.truncate(path, length)
    cut = build_index(path)
    assert not cut.intact
    complete = [m for m in whole.members if m.offset + m.size <= length]
    assert cut.members[: len(complete)] == complete
    assert len(cut.members) <= len(complete) + 1


def test_a_damaged_header_is_no_end(tmp_path):
    path = pack(tmp_path / "x.tar", MEMBERS)
    with path.open("r+b") as file:
        file.seek(3 * 512 + 20)
        file.write(b"damage")
    index = build_index(path)
    assert [m.key for m in index.members] == ["a"]
    assert not index.intact


def test_the_index_is_kept_and_made_again_when_the_tar_changes(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.tar", MEMBERS)
    first = load_index(path)
    assert (tmp_path / "x.tar.idx").is_file()
    built = []
    monkeypatch.setattr(tar_index, "build_index", lambda tar: built.append(tar) or build_index(tar))
    assert load_index(path) == first
    assert not built
    pack(path, [*MEMBERS, ("d.png", b"new")])
    assert len(load_index(path).members) == 5
    (tmp_path / "x.tar.idx").write_text('{"version": 1, "members": [["a", "b", -1]]}')
    assert len(load_index(path).members) == 5
    assert len(built) == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.tar", "x.tar.idx"]


@pytest.mark.parametrize("junk", ["", "[]", "{", '{"version": 1}', '{"version": 99}', '{"version": 1, "members": 3}'])
def test_an_index_that_cannot_be_used_is_made_again(tmp_path, junk):
    path = pack(tmp_path / "x.tar", MEMBERS)
    good = load_index(path)
    (tmp_path / "x.tar.idx").write_text(junk)
    assert load_index(path) == good
    assert (tmp_path / "x.tar.idx").read_text() != junk


def test_an_index_elsewhere_or_in_memory(tmp_path, monkeypatch, caplog):
    one, two = (pack(tmp_path / each / "x.tar", MEMBERS[:i]) for i, each in ((1, "one"), (2, "two")))
    for _ in range(2):
        assert [len(load_index(each, tmp_path / "cache" / "deep").members) for each in (one, two)] == [1, 2]
    assert len(list((tmp_path / "cache" / "deep").iterdir())) == 2
    assert not (tmp_path / "one" / "x.tar.idx").exists()
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.INFO, "vqf"):
        assert len(load_index(two, tmp_path / "file").members) == 2
    assert "the index is rebuilt in every run" in caplog.text


def test_a_truncated_or_missing_tar_keeps_its_index(tmp_path, caplog):
    path = pack(tmp_path / "x.tar", MEMBERS)
    whole = load_index(path)
    os.truncate(path, whole.members[2].offset + 10)
    assert load_index(path) == whole
    assert f"'{path}' is truncated: {whole.members[2].offset + 10} of {whole.size} bytes" in caplog.text
    tars = TarReader([path])
    for member, content in zip(whole.members[:2], (b"x" * 700, b"3"), strict=True):
        assert tars.read(0, member.offset, member.size, member.crc) == content
    with pytest.raises(UnreadableError, match=r"^x.tar is truncated$"):
        tars.read(0, *whole.members[2][2:5])
    path.unlink()
    assert load_index(path) == whole
    assert "is missing; its 4 members count as unreadable" in caplog.text
    with pytest.raises(UnreadableError, match=r"^x.tar: no such file or directory$"):
        TarReader([path]).read(0, *whole.members[0][2:5])


def test_a_smaller_tar_of_other_content_is_indexed_again(tmp_path):
    path = pack(tmp_path / "x.tar", [(f"{i}.bin", os.urandom(900)) for i in range(40)])
    load_index(path)
    pack(path, [("other.bin", os.urandom(900)) for _ in range(3)])
    assert [m.key for m in load_index(path).members] == ["other"] * 3


def test_a_flipped_bit_is_seen(tmp_path):
    path = pack(tmp_path / "x.tar", MEMBERS)
    member = load_index(path).members[0]
    with path.open("r+b") as file:
        file.seek(member.offset + 5)
        file.write(b"y")
    with pytest.raises(UnreadableError, match=r"^its checksum is not the one in x.tar.idx$"):
        TarReader([path]).read(0, *member[2:5])


def test_many_tars_do_not_use_up_the_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "MAX_OPEN_FILES", 3)
    paths = [pack(tmp_path / f"{i}.tar", [("a.bin", bytes([i]) * 9)]) for i in range(8)]
    places = [build_index(path).members[0][2:5] for path in paths]
    tars = TarReader(paths)
    for i in (*range(8), 0, 7, 3):
        assert tars.read(i, *places[i]) == bytes([i]) * 9
    assert len(tars._file_descriptors) == 3
    again = pickle.loads(pickle.dumps(tars))
    assert again._file_descriptors == {}
    assert again.read(5, *places[5]) == bytes([5]) * 9


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/x.png", "C:/x.png", "a\\x.png", "a\nb.png", "./../x.p"]
)
def test_unsafe_member_names_are_refused(tmp_path, name):
    path = pack(tmp_path / "x.tar", [("fine.png", b"1"), (name, b"2")])
    message = worded(lambda: load_index(path))
    assert message == f"data.root: the shard '{path}' has a member with the unsafe name {name!a}"
    assert [each.name for each in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused_in_words(tmp_path, mode, kind):
    path = pack(tmp_path / "x.tar", MEMBERS, mode)
    assert worded(lambda: load_index(path)) == (
        f"data.root: the shard '{path}' is compressed ({kind}), so its members cannot be read one by one; "
        "unpack it to a plain .tar"
    )


def test_what_is_no_tar_or_not_there(tmp_path):
    path = tmp_path / "x.tar"
    assert worded(lambda: load_index(path)) == f"data.root: no shard '{path}' (no such file or directory)"
    path.write_bytes(os.urandom(3000))
    assert worded(lambda: load_index(path)).startswith(f"data.root: the shard '{path}' is not a tar file (")
    path.unlink()
    path.mkdir()
    assert worded(lambda: load_index(path)) == f"data.root: cannot read the shard '{path}' (is a directory)"


@pytest.mark.parametrize("field", [b"\x80" + b"\0" * 10 + b"\x20", b"\xff" * 12, b"7" * 11 + b"\0"])
def test_a_crafted_length_neither_hangs_nor_reads_what_is_not_there(tmp_path, field):
    """Lengths of 32 bytes in base 256, of -1, and of eight gigabytes."""
    path = pack(tmp_path / "x.tar", [("a.bin", b"1" * 32), ("b.bin", b"2")])
    content = bytearray(path.read_bytes())
    content[124:136] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    try:
        index = build_index(path)
    except UserError as error:
        assert "is not a tar file" in str(error)  # noqa: PT017  (either answer is right, by version of Python)
        return
    tars = TarReader([path])
    for member in index.members:
        if member.key == "a" and member.size != 32:
            with pytest.raises(UnreadableError):
                tars.read(0, *member[2:5])


@given(st.text("ab./", max_size=8))
def test_names_are_split_as_webdataset_splits_them_but_for_hidden_files(name):
    from webdataset.tariterators import base_plus_ext

    hidden = name.rpartition("/")[2].startswith(".")  # a file of the system, of which webdataset makes a sample
    expected = base_plus_ext(name)
    assert split_member_name(name) == (None if hidden or expected == (None, None) else expected)
