"""Which shards a pattern names: files below a folder, or addresses."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vqf.data.tar.index import INDEX_SUFFIX
from vqf.data.tar.remote_io import check_url, is_url, redact_url
from vqf.errors import UserError


def expand_pattern(pattern: str, option: str) -> list[str]:
    """Write out webdataset's braces, and divide at `::`.

    Raises:
        UserError: For a pattern that is none.
    """
    from webdataset.shardlists import expand_urls

    try:
        return list(dict.fromkeys(expand_urls(pattern)))
    except ValueError as error:
        raise UserError(f"{option}={pattern}: {str(error).lower()}; write it as in train-{{0000..0146}}.tar") from error


def find_shards(root: Path, pattern: str, option: str, listed: Collection[str] = ()) -> list[Path]:
    """Return the shards that a pattern names: those of braces all, whether they are there or not.

    Args:
        root: What names are below.
        pattern: Braces or wildcards.
        option: Where the pattern was given.
        listed: Names of shards below the root that should be there.

    Raises:
        UserError: For a pattern that is none.
    """
    names = expand_pattern(pattern, option)
    found = [path for name in names for path in (_glob_shards(root, name, listed) if _is_wild(name) else [root / name])]
    return list(dict.fromkeys(found))


def is_streamed(root: str | None, pattern: str, option: str) -> bool:
    """Say whether a pattern names shards that are not in a folder."""
    return any(is_url(name) for name in (root or "", *expand_pattern(pattern, option)))


def find_urls(root: str | None, pattern: str, option: str, listed: Sequence[str]) -> list[str]:
    """Return the addresses of the shards that a pattern names.

    Args:
        root: What a name without an address is below: an address or a folder.
        pattern: Braces, or wildcards among the names that are `listed`.
        option: Where the pattern was given.
        listed: Names of shards below the root.

    Raises:
        UserError: For wildcards where nothing is listed, and for addresses that cannot, or must not, be opened.
    """
    found: list[str] = []
    for name in expand_pattern(pattern, option):
        if is_url(name):
            check_url(name, option)
            found.append(name)
        elif root is None:
            raise UserError(f"{option}={pattern}: '{name}' is no address; data.root says what it is below")
        elif _is_wild(name) and not listed:
            raise UserError(
                f"{option}={pattern}: '{redact_url(root)}' cannot be searched; name the shards as in "
                f"train-{{0000..0146}}.tar ({option}=null for none), or put the manifest.json of pipeline=shard there"
            )
        else:
            names = [each for each in listed if fnmatchcase(each, name)] if _is_wild(name) else [name]
            found += [f"{root.rstrip('/')}/{each}" for each in names]
    return list(dict.fromkeys(found))


def _is_wild(name: str) -> bool:
    return bool(set(name) & set("*?"))


def _glob_shards(root: Path, wildcard: str, listed: Collection[str]) -> list[Path]:
    """Find shards; the index of one that is missing stands for it."""
    indexed = (path.with_name(path.name.removesuffix(INDEX_SUFFIX)) for path in root.glob(wildcard + INDEX_SUFFIX))
    known = (root / name for name in listed if fnmatchcase(name, wildcard))
    return sorted({*root.glob(wildcard), *indexed, *known})
