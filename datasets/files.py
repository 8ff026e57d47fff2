"""Write files that appear whole or not at all, name files safely, and find files and folders."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` when the block succeeds, remove it when it fails.

    The temporary file is in the folder of `path`, which is created if needed, and has the extension of `path`, because
    numpy, nibabel and matplotlib look at it. An OSError that names no file gets the name `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # The error of a full disk names no file, and a user does not know the temporary file.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def find_folders(root: str | Path, name: str) -> list[Path]:
    """Return the folders called ``name`` anywhere below ``root`` in sorted order; links are followed."""
    return sorted(Path(folder, name) for folder, inside, _ in _walk(root) if name in inside)


def find_files(root: str | Path) -> list[Path]:
    """Return all files anywhere below ``root`` in sorted order; links are followed."""
    paths = (Path(folder, name) for folder, _, names in _walk(root) for name in names)
    return sorted(path for path in paths if path.is_file())


def _walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the same as ``os.walk``; follow links, but visit each folder only once."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # reached by a link to a parent folder, or for a second time
            inside.clear()
        else:
            yield folder, inside, names
        seen.add(real)


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files that ``atomic_write`` leaves in a folder if its process is killed."""
    for path in Path(folder).glob(".tmp[0-9]*-*"):
        path.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Create a folder and write to it, so that an OSError is raised before hours of work, not after them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def file_stem(name: str) -> str:
    """Return the name of a case as a file name without extension that cannot point outside a folder.

    Every character except letters, digits, `.`, `_` and `-` becomes `_`; leading dots are removed.
    """
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"
