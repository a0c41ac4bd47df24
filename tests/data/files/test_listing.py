from vqf.data.files.listing import scan
from vqf.data.files.packed import File


def test_a_scan_finds_what_a_walk_finds(tmp_path):
    for name in ("a/1.png", "a/b/2.PNG", "a/.3.png", ".h/4.png", "5.png.txt", "6.png/7.png", "z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "first").symlink_to(tmp_path / "second")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "8.png").touch()
    expected = {"a/1.png": 7, "a/b/2.PNG": 9, "6.png/7.png": 11, "z.png": 5, "gone.png": -1, "first/8.png": 0}
    assert scan(tmp_path, [".png"]).files == sorted(File(name, size) for name, size in expected.items())
