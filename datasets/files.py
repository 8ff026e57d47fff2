"""Files that appear whole or not at all, under names that stay in their folder."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, moved to `path` when the block ends well and removed when it fails.

    The temporary lies in the folder of `path`, which is made if needed, and ends like `path`, so that writers
    which go by the ending (numpy, nibabel, matplotlib) work. An OSError that names no file gets `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # A write to a full disk does not know its file, and nobody knows the temporary.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def remove_temporaries(folder: str | Path) -> None:
    """Remove what ``atomic_write`` left in a folder where its process was killed."""
    for path in Path(folder).glob(".tmp[0-9]*-*"):
        path.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Make a folder and write to it, so that an OSError comes before hours of work and not after."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")


def file_stem(name: str) -> str:
    """Turn the name of a case into the start of a file name that cannot lead out of a folder.

    Everything but letters, digits, `.`, `_` and `-` becomes `_`; leading dots go.
    """
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "_"
