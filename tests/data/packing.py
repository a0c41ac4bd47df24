"""Images and tars to test with. The tars are made by the standard library, not by what is tested."""

import io
import tarfile

from PIL import Image


def png(color=(200, 30, 60), size=(20, 16)):
    """Return the bytes of a plain image."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def pack(path, members, mode="w:"):
    """Write a tar of names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def red(sample):
    """Return the red of a plain image."""
    return round(float(sample.image[0].mean() + 1) * 127.5)


def shard(path, reds, **labels):
    """Write a shard of plain images; `cls` or `json` is a function of the red of each."""
    members = []
    for each in reds:
        members += [(f"{each:04}.{ending}", label(each).encode()) for ending, label in labels.items()]
        members.append((f"{each:04}.png", png((each, 0, 0))))
    return pack(path, members)
