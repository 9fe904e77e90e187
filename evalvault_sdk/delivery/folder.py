"""
Find the folder for what is kept on disk, and make it private.

In:   the environment; a destination.
Out:  a folder per user (`default_root`), in it one per destination (`folder_of`), 0700 and our own.

What is kept there are users' questions: a folder of somebody else's is refused, not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from evalvault_sdk.private import check_private, make_private

#: In a destination's folder: where its events go, for people and for the command.
DESTINATION_FILE = "destination"


def default_root(environ: Mapping[str, str]) -> Path:
    """
    Return where spools are kept unless a setting says otherwise.

    `$XDG_STATE_HOME/evalvault/spool`, else `~/.local/state/evalvault/spool`, else, for a user without a home or
    with one that cannot be written, as in many containers, `evalvault-<uid>` in the folder for temporary files.
    """
    state = environ.get("XDG_STATE_HOME")
    if state and Path(state).is_absolute():
        return Path(state) / "evalvault" / "spool"
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - never raises, unlike Path.home
    if home.is_absolute() and home != Path(home.anchor) and _could_write(home / ".local" / "state" / "evalvault"):
        return home / ".local" / "state" / "evalvault" / "spool"
    import tempfile  # not needed by most, and slow to import

    return Path(tempfile.gettempdir()) / f"evalvault-{_user()}"


def folder_of(root: str | Path, destination: str) -> Path:
    """
    Return the folder for one destination: its name for people, a hash that tells it from all others.

    And the user: those of one user never stand in the way of another's in a root that they share.
    """
    parts = urlsplit(destination)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        identity = f"{parts.scheme}://{parts.hostname}:{port}{parts.path}"
        name = f"{parts.hostname}-{port}"
    else:
        identity, name = destination, Path(destination).name
    readable = re.sub(r"[^0-9A-Za-z.]+", "-", name).strip("-.")[:40] or "destination"
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return Path(root) / f"{readable}-{digest}.{_user()}"


def make_folder(folder: Path, destination: str) -> None:
    """Make a destination's folder, private, if it is not there. Raises `OSError` if it cannot be ours alone."""
    root = folder.parent
    if not root.is_dir():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.name == f"evalvault-{_user()}":
        check_private(root)  # in a folder that everybody may write to, anybody may have made it before us
    make_private(folder)
    path = folder / DESTINATION_FILE
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w", encoding="utf-8", errors="surrogateescape") as text:
                text.write(destination + "\n")


def _could_write(folder: Path) -> bool:
    """Whether `folder` could be made, or written to if it is there."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "0"
