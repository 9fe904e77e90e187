"""
Make folders that are ours alone: what is in them are users' questions.

In:   the path of a folder.
Out:  a folder that nobody else may look into, or an `OSError` that says why that cannot be.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def make_private(folder: Path, *, parents: bool = False) -> None:
    """Make a folder if it is not there. Raises `OSError` if it cannot be ours alone."""
    try:
        folder.mkdir(mode=0o700, parents=parents)
        folder.chmod(0o700)  # whatever the umask took from us
    except FileExistsError:
        check_private(folder)


def check_private(folder: Path) -> None:
    """Take from others what rights they have. Raises `OSError` if it is no folder, or belongs to another user."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is no folder, or a link to one", str(folder))
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "belongs to another user: name one in it", str(folder))
    if status.st_mode & 0o077:
        folder.chmod(0o700)
