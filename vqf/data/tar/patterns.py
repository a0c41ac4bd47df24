"""Expand shard names, such as `train-{0000..0146}.tar`."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vqf.data.tar.index_file import INDEX_SUFFIX
from vqf.data.tar.remote_io import check_url, is_url, redact_url
from vqf.errors import UserError


def expand_pattern(pattern: str, option: str) -> list[str]:
    """Expand webdataset's braces, and split at `::`; wildcards stay.

    Raises:
        UserError: If the braces are invalid.
    """
    from webdataset.shardlists import expand_urls

    try:
        return list(dict.fromkeys(expand_urls(pattern)))
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {str(error).lower()}; write it as in train-{{0000..0146}}.tar") from error


def find_shards(root: Path, pattern: str, option: str, listed: Collection[str] = ()) -> list[Path]:
    """Return the shards of a pattern; braces name missing ones, too, and wildcards match those `listed` in the
    manifest.

    Raises:
        UserError: If the braces are invalid.
    """
    names = expand_pattern(pattern, option)
    paths = [path for name in names for path in (_glob_shards(root, name, listed) if _is_wild(name) else [root / name])]
    return list(dict.fromkeys(paths))


def is_streamed(root: str | None, pattern: str, option: str) -> bool:
    """Whether a pattern names shards at a URL."""
    return any(is_url(name) for name in (root or "", *expand_pattern(pattern, option)))


def find_urls(root: str | None, pattern: str, option: str, listed: Sequence[str]) -> list[str]:
    """Return the URLs of the shards of a pattern, whose wildcards match those `listed` in the manifest.

    Raises:
        UserError: If there are wildcards and no manifest, or a URL cannot, or must not, be opened.
    """
    urls: list[str] = []
    for name in expand_pattern(pattern, option):
        if is_url(name):
            check_url(name, option)
            urls.append(name)
        elif root is None:
            raise UserError(f"{option}={pattern}: '{name}' is not a URL; give the URL of its folder as data.root")
        elif _is_wild(name) and not listed:
            raise UserError(
                f"{option}={pattern}: '{redact_url(root)}' cannot be searched; name the shards as in "
                f"train-{{0000..0146}}.tar ({option}=null for none), or put the manifest.json of pipeline=shard there"
            )
        else:
            names = [shard for shard in listed if fnmatchcase(shard, name)] if _is_wild(name) else [name]
            urls += [f"{root.rstrip('/')}/{shard}" for shard in names]
    return list(dict.fromkeys(urls))


def _is_wild(name: str) -> bool:
    return bool(set(name) & set("*?"))


def _glob_shards(root: Path, wildcard: str, listed: Collection[str]) -> list[Path]:
    """Match existing shards, and missing ones in an index or the manifest."""
    indexed = (path.with_name(path.name.removesuffix(INDEX_SUFFIX)) for path in root.glob(wildcard + INDEX_SUFFIX))
    in_manifest = (root / name for name in listed if fnmatchcase(name, wildcard))
    return sorted({*root.glob(wildcard), *indexed, *in_manifest})
