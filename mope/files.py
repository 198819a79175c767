"""Write files atomically, and explain errors of full disks."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

# With fewer free bytes than this, a failed write is blamed on a full disk.
SPACE = 2**20


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: a previous file is kept until the new one is complete.

    Raises:
        OSError: The file cannot be written; the message names it, and whether the disk is full.
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
    """Return an OSError that starts with `what` and reports whether the disk is full, which many libraries do not."""
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(folder).free < SPACE
    is_said = "no space left" in str(error).lower()
    return OSError(f"{what}: no space left on the disk ({error})" if is_full and not is_said else f"{what}: {error}")
