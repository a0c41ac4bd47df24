"""What shards hold besides the images and labels that are read."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from vqf.data.images.decode import UnreadableError
from vqf.data.tar.index_file import TarMember
from vqf.data.tar.members import SampleMembers, is_image_extension
from vqf.data.tar.reader import TarReader
from vqf.errors import quote_name

log = logging.getLogger("vqf")

MAX_KINDS = 8  # extensions in a log line, the most frequent first
MAX_JSON_BYTES = 2**20
OWN_FIELDS = {"name"}  # of the .json that pipeline=shard writes


class MemberInventory:
    """Counts the members that are not read, and the samples that are left out.

    Args:
        place: Where they are, for messages: "the train shards".
    """

    def __init__(self, roles: SampleMembers, place: str) -> None:
        self.roles, self.place = roles, place
        self.samples = 0
        self.other_images: Counter[str] = Counter()  # images beside the one that is read, by extension
        self.read_beside: Counter[str] = Counter()  # extensions of the images that are read instead
        self.no_image: Counter[str] = Counter()  # members of samples without an image, by extension
        self.without_image: list[str] = []  # those samples
        self.unread: Counter[str] = Counter()  # other members, by extension
        self.outside: Counter[str] = Counter()  # members that belong to no sample, by kind
        self.first_json: tuple[Path, TarMember] | None = None

    def add_sample(self, name: str, extensions: Collection[str], image: str | None) -> None:
        """Count the members of a sample, of which `image` is read."""
        self.samples += 1
        if image is None:
            self.without_image.append(name)
            self.no_image.update([*extensions])
            return
        read = {image, self.roles.label_extension, self.roles.find_map(extensions)}
        others = [extension for extension in extensions if extension not in read]
        images = [extension for extension in others if is_image_extension(extension)]
        self.other_images.update(images)
        self.read_beside.update([image] if images else [])
        self.unread.update(extension for extension in others if extension not in images)

    def log_messages(self) -> None:
        """Log one line for each kind of loss."""
        fields = self._json_fields()
        if fields == OWN_FIELDS and self.roles.label_key is None:
            del self.unread["json"]
        if self.other_images:
            level = logging.WARNING if self.roles.image is None else logging.INFO
            log.log(level, self._other_images_message())
        if self.without_image:
            image = "image" if self.roles.image is None else f".{self.roles.image}"
            log.warning(
                f"data.image: {len(self.without_image)} of the {self.samples} samples in {self.place} have no {image} "
                f"and are left out, such as {quote_name(self.without_image[0])}; they have "
                f"{count_extensions(self.no_image)}"
            )
        if self.unread:
            json_fields = f" (fields {', '.join(sorted(fields))})" if fields and "json" in self.unread else ""
            members = count_extensions(self.unread)
            log.info(f"data.label_key: not read in {self.place}: {members}{json_fields}; {LABEL_CURE}")
        if self.outside:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.outside.most_common())
            log.info(f"data.root: members of no sample in {self.place} are left out: {kinds}")

    def _other_images_message(self) -> str:
        return (
            f"data.image: {self.other_images.total()} images in {self.place} are left out, because another one of the "
            f"same sample is read: {count_extensions(self.other_images)} beside {count_extensions(self.read_beside)}; "
            f"{image_cure(self.roles)}"
        )

    def _json_fields(self) -> set[str]:
        if self.first_json is None:
            return set()
        path, member = self.first_json
        if member.size > MAX_JSON_BYTES:
            return set()
        try:
            content = json.loads(TarReader([path]).read(0, member.offset, member.size, member.crc))
        except (UnreadableError, ValueError, RecursionError):
            return set()
        return set(content) if isinstance(content, dict) else set()


LABEL_CURE = "labels are in .cls, or in the field of .json that data.label_key names"


def image_cure(roles: SampleMembers) -> str:
    """Return which options read other images of a sample."""
    cure = "data.image=EXTENSION reads another one"
    return cure if roles.key == "last_dot" else f"{cure}, data.key=last_dot makes each a sample of its own"


def count_extensions(counts: Mapping[str, int]) -> str:
    """Return ".txt 8, .json 3"."""
    kinds = [f".{extension} {count}" for extension, count in Counter(counts).most_common(MAX_KINDS)]
    return ", ".join(kinds) + (f" and {len(counts) - MAX_KINDS} other extensions" if len(counts) > MAX_KINDS else "")


def stream_notes(
    name: str, extensions: Iterable[str], image: str | None, roles: SampleMembers
) -> Iterator[tuple[int, str]]:
    """Yield the kind of each loss in a sample of a stream, from 0 to 2, and a line about it."""
    sample = MemberInventory(roles, "")
    sample.add_sample(name, [*extensions], image)
    again = "as perhaps in other samples of the stream"
    if sample.other_images:
        others = ", ".join(f".{extension}" for extension in sample.other_images)
        yield 0, f"data.image: {quote_name(name)}: .{image} is read and {others} left out, {again}; {image_cure(roles)}"
    if sample.without_image:
        members = ", ".join(f".{extension}" for extension in sample.no_image)
        yield 1, f"data.image: {quote_name(name)} has no image and is left out, {again}; it has {members}"
    if sample.unread and sample.unread.keys() != {"json"}:
        members = ", ".join(f".{extension}" for extension in sample.unread)
        yield 2, f"data.label_key: {quote_name(name)}: {members} not read, {again}; {LABEL_CURE}"
