"""
Keep inputs and outputs that are too large, or too private, to travel with their event.

In:   the bytes of a payload.
Out:  a `StagePayloadRef` for the event's `input_ref` or `output_ref`; later, for that reference, the bytes.
Any thread, any process: a payload is a file of its own, there as a whole or not at all, and never changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.events import StagePayloadRef
from evalvault_sdk.private import make_private

#: What `put` names its files, and all that `get` takes for a name: nothing else can be meant.
_ID = re.compile("[0-9a-f]{32}")
#: The end of the name of a file that is being written.
_UNFINISHED = ".part"
#: No file is written for so long: it was left by a process that was killed.
_MAX_WRITING_S = 3600.0


class PayloadStore(Protocol):
    """Where inputs and outputs are kept that are too large to travel with their event."""

    def put(self, payload: bytes, *, type: str = "json") -> StagePayloadRef:
        """Keep `payload`; return the reference to put into the event."""
        ...

    def get(self, ref: StagePayloadRef | Mapping[str, str]) -> bytes:
        """Return what `ref` stands for. Raises `LookupError` if it is not there."""
        ...


class FolderPayloadStore:
    """
    A `PayloadStore` in a private folder: 0700, and its files 0600, whatever the umask.

        store = FolderPayloadStore("/var/lib/rag/payloads")
        stage.output_ref = store.put(orjson.dumps(documents))

    The folder is made by the first `put`, or made private if it is there. Unlike recording, `put` writes in the
    caller's thread, and raises `OSError` when the disk is full or the folder cannot be ours alone. A payload
    survives its process; a power cut may cost the last ones. Nothing is deleted by itself: call `purge` now and
    then, or let cron do it: `find FOLDER -type f -mmin +10080 -delete` after 7 days.

    `name` is the references' `store`: it tells readers which store to ask, where there are several.
    """

    def __init__(self, folder: str | os.PathLike[str], *, name: str = "folder") -> None:
        if not os.fspath(folder):  # a variable that is not set: never make the working directory private
            raise ConfigurationError("folder must be the path of a folder, not empty")
        self.folder = Path(folder).absolute()  # whatever the working directory is later
        self.name = StagePayloadRef(name, "id").store  # refused now, and not with the first payload

    def put(self, payload: bytes, *, type: str = "json") -> StagePayloadRef:
        """Write `payload` to a file of its own. Raises `OSError`; then nothing is left of it."""
        ref = StagePayloadRef(self.name, uuid.uuid4().hex, type)  # not new_stage_id(), which could be guessed
        path = self._path(ref.id)
        make_private(self.folder, parents=True)
        make_private(path.parent)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(payload)
            unfinished.chmod(0o600)  # the umask may have taken it from us as well
            unfinished.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
        return ref

    def get(self, ref: StagePayloadRef | Mapping[str, str]) -> bytes:
        """Return the payload. Raises `InvalidStageEventError` for what is no reference, `LookupError` if it is gone."""
        if not isinstance(ref, StagePayloadRef):
            ref = StagePayloadRef.from_dict(ref)
        if ref.store != self.name:
            raise LookupError(f"the payload is in the store {ref.store!r}, not in {self.name!r}: ask that one")
        if not _ID.fullmatch(ref.id):
            raise LookupError(f"{ref.id!r} is no id of a payload in a folder: 32 hex digits, as put() returned them")
        try:
            return self._path(ref.id).read_bytes()
        except FileNotFoundError:
            raise LookupError(
                f"there is no payload {ref.id} in {self.folder}: it was purged, or written to another folder"
            ) from None

    def purge(self, older_than_s: float) -> int:
        """Delete payloads that were written at least `older_than_s` seconds ago; return how many."""
        now = time.time()
        purged = 0
        for path in self._files():
            least_s = max(older_than_s, _MAX_WRITING_S) if path.suffix == _UNFINISHED else older_than_s
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile, or purged by another process
                if now - path.lstat().st_mtime >= least_s:
                    path.unlink()
                    purged += path.suffix != _UNFINISHED
        return purged

    def _path(self, id: str) -> Path:
        # By the last two digits, 256 folders: a folder of a million files is slow on many disks.
        return self.folder / id[-2:] / id

    def _files(self) -> Iterator[Path]:
        """Our files and no others, those that a killed process left unfinished among them."""
        for number in range(256):
            with contextlib.suppress(FileNotFoundError):
                for path in (self.folder / f"{number:02x}").iterdir():
                    if _ID.fullmatch(path.name.removesuffix(_UNFINISHED)):
                        yield path
