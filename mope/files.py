"""Files that are written whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

# With less than this left, whatever could not be written did not find space.
SPACE = 2**20


def write_text(file: Path, text: str) -> None:
    """All of a text or nothing of it, and what stood there before stays until all is written.

    Raises:
        OSError: says which file, and whether no space is left.
    """
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise disk_error(f"{file} cannot be written", file.parent, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def disk_error(what: str, folder: Path, error: BaseException) -> OSError:
    """`what` went wrong, and whether for want of space, of which many libraries say nothing."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(folder).free < SPACE
    is_said = "no space left" in str(error).lower()
    return OSError(f"{what}: no space left on the disk ({error})" if is_full and not is_said else f"{what}: {error}")
