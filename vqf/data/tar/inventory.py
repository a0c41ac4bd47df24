"""What shards hold besides the images and labels that are read."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from vqf.data.images.decode import UnreadableError
from vqf.data.tar.index_file import TarMember
from vqf.data.tar.members import SampleMembers, is_image_extension
from vqf.data.tar.reader import TarReader
from vqf.errors import quote_name

log = logging.getLogger("vqf")

MAX_KINDS = 8  # extensions in a log line, the most frequent first
MAX_JSON_BYTES = 2**20
OWN_FIELDS = {"name"}  # of the .json that pipeline=shard writes

Extensions = tuple[str, ...]  # of the members of a sample


class MemberInventory:
    """Counts the members that are not read, and the samples that are left out.

    Args:
        place: Where they are, for messages: "the train shards".
    """

    def __init__(self, roles: SampleMembers, place: str) -> None:
        self.roles, self.place = roles, place
        self.kinds: Counter[Extensions] = Counter()  # samples by the extensions of their members
        self.images: dict[Extensions, str | None] = {}  # which of them is the image
        self.first_without_image: str | None = None
        self.outside: Counter[str] = Counter()  # members that belong to no sample, by kind
        self.first_json: tuple[Path, TarMember] | None = None

    def add_sample(self, shard: str, key: str, extensions: Extensions) -> str | None:
        """Count a sample, and return the extension of its image."""
        if extensions not in self.images:  # samples are many, and their kinds are few
            self.images[extensions] = self.roles.find_image(extensions)
        self.kinds[extensions] += 1
        if (image := self.images[extensions]) is None and self.first_without_image is None:
            self.first_without_image = f"{shard}/{key}"
        return image

    def unread(self, images: bool) -> Counter[str]:
        """Count the members beside an image that are not read, by extension: other images, or the rest."""
        counts: Counter[str] = Counter()
        for kind, count in self.kinds.items():
            read = {self.images[kind], self.roles.label_extension, self.roles.find_map(kind)}
            others = [] if self.images[kind] is None else [each for each in kind if each not in read]
            counts.update({each: count for each in others if is_image_extension(each) == images})
        return counts

    def log_messages(self) -> None:
        """Log one line for each kind of loss."""
        if self.unread(images=True):
            log.log(logging.WARNING if self.roles.image is None else logging.INFO, self._other_images_message())
        if self.first_without_image:
            log.warning(self._without_image_message())
        fields, unread = self._json_fields(), self.unread(images=False)
        if fields == OWN_FIELDS:
            del unread["json"]
        if unread:
            json_fields = f" (fields {', '.join(sorted(fields))})" if fields and "json" in unread else ""
            members = count_extensions(unread)
            log.info(f"data.label_key: not read in {self.place}: {members}{json_fields}; {LABEL_CURE}")
        if self.outside:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.outside.most_common())
            log.info(f"data.root: members of no sample in {self.place} are left out: {kinds}")

    def _other_images_message(self) -> str:
        others, read = self.unread(images=True), Counter[str]()
        for kind, count in self.kinds.items():
            image, read_map = self.images[kind], self.roles.find_map(kind)
            if image and any(is_image_extension(each) for each in kind if each not in (image, read_map)):
                read[image] += count
        return (
            f"data.image: {others.total()} images in {self.place} are left out, because another one of the same sample "
            f"is read: {count_extensions(others)} beside {count_extensions(read)}; {image_cure(self.roles)}"
        )

    def _without_image_message(self) -> str:
        lost = {kind: count for kind, count in self.kinds.items() if self.images[kind] is None}
        members: Counter[str] = Counter()
        for kind, count in lost.items():
            members.update(dict.fromkeys(kind, count))
        image = "image" if self.roles.image is None else f".{self.roles.image}"
        return (
            f"data.image: {sum(lost.values())} of the {self.kinds.total()} samples in {self.place} have no {image} and "
            f"are left out, such as {quote_name(self.first_without_image or '')}; they have {count_extensions(members)}"
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


class StreamNotes:
    """Mentions the first loss of each kind in a stream, which does not know how many follow; once over all workers."""

    def __init__(self, roles: SampleMembers) -> None:
        self.roles = roles
        self.seen: set[Extensions] = set()
        self.noted = torch.zeros(3, dtype=torch.bool).share_memory_()

    def add(self, name: str, extensions: Extensions) -> None:
        """Log what a sample loses, unless other samples of its kind have lost the same."""
        if extensions in self.seen:
            return
        self.seen.add(extensions)
        for kind, message in self._messages(quote_name(name), extensions):
            if not self.noted[kind]:
                self.noted[kind] = True
                log.warning(f"{message}, as perhaps in other samples of the stream; {self._cure(kind)}")

    def _messages(self, name: str, extensions: Extensions) -> Iterator[tuple[int, str]]:
        sample = MemberInventory(self.roles, "")
        image = sample.add_sample("", name, extensions)
        others, unread = sample.unread(images=True), sample.unread(images=False)
        if others:
            yield 0, f"data.image: {name}: .{image} is read and {_join(others)} left out"
        if image is None:
            yield 1, f"data.image: {name} has no image and is left out; it has {_join(extensions)}"
        if unread and unread.keys() != {"json"}:
            yield 2, f"data.label_key: {name}: {_join(unread)} not read"

    def _cure(self, kind: int) -> str:
        return (image_cure(self.roles), "data.image=EXTENSION names the image", LABEL_CURE)[kind]


def _join(extensions: Iterable[str]) -> str:
    return ", ".join(f".{extension}" for extension in extensions)
