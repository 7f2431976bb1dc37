"""Which files a checkpoint consists of and a hash of each: written last, compared before anything of it is read.

The arrays' digests (checkpoint.py) say that numbers are those that were saved; this says so of every file, needs
neither a device nor the run's shapes, and its absence says that a checkpoint is not whole. Does not import jax.
"""

import concurrent.futures
import hashlib
import json

from etils import epath

from skysense_jax import storage

NAME = "MANIFEST.json"
_READ_BYTES = 2**22
_THREADS = 8
_MAX_NAMED = 5  # files that a message lists


def write(directory: epath.Path) -> None:
    """Hashes all files under ``directory`` and writes the manifest there; half of one is none."""
    files = _described(directory)
    text = json.dumps({"files": files, "sha256": _sealed(files)}, indent=1, sort_keys=True)
    if storage.in_bucket(directory):  # an object is there whole or not at all
        (directory / NAME).write_text(text)
        return
    unnamed = directory / f"{NAME}.tmp"
    unnamed.write_text(text)
    unnamed.replace(directory / NAME)


def is_there(directory: epath.Path) -> bool:
    """Whether what is under ``directory`` was written to its end."""
    return (directory / NAME).exists()


def problem(directory: epath.Path) -> str:
    """What of a checkpoint is not as it was written, nothing if all is; reads every byte of it.

    Raises:
      OSError: of files that are there but may not be read, or whatever a bucket's client raises.
    """
    if not is_there(directory):
        return f"there is no {NAME}: it was not written to its end"
    try:
        written = json.loads((directory / NAME).read_text())
        wanted = {path: tuple(described) for path, described in written["files"].items()}
        if written["sha256"] != _sealed(written["files"]):
            raise ValueError("its hash is another")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON's and Unicode's errors are ValueErrors
        return f"{NAME} is not what was written: {type(error).__name__}: {error}"
    found = _described(directory)
    differing = [f"{path} is missing" for path in wanted if path not in found]
    differing += [f"{path} was not there" for path in found if path not in wanted]
    for path in sorted(wanted.keys() & found.keys()):
        if found[path] != wanted[path]:
            (size, _), (before, _) = found[path], wanted[path]
            differing.append(f"{path} has {size} bytes, had {before}" if size != before else f"{path} is changed")
    more = f"; and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
    return "; ".join(differing[:_MAX_NAMED]) + more


def _described(directory: epath.Path) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256) of each file by its path below ``directory``, the manifest left out."""
    own = directory / NAME, directory / f"{NAME}.tmp"
    files = sorted(path for path in _walk(directory) if path not in own)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashing and reading leave the interpreter alone
        described = pool.map(_describe, files)
        return {str(path.relative_to(directory)): of_file for path, of_file in zip(files, described)}


def _walk(directory: epath.Path):
    for path in directory.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _describe(path: epath.Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()


def _sealed(files) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
