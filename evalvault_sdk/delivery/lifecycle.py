"""
Follow the process: what becomes of workers when it ends, and when it forks.

In:   workers as they are made, started and ended; the interpreter's own hooks.
Out:  every started worker ended with the process, within its timeout; every worker of a forked child told.

Hooks: `atexit` (also for exceptions, `sys.exit`, daemon threads), multiprocessing's finalizers for its
children, which leave without running `atexit`, and `os.register_at_fork`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalvault_sdk.delivery.worker import Worker

_made: weakref.WeakSet[Worker] = weakref.WeakSet()
#: Workers that still have to be ended when the process ends.
_running: set[Worker] = set()


def made(worker: Worker) -> None:
    """From now on `worker` is told of forks."""
    _made.add(worker)


def started(worker: Worker) -> None:
    """From now on `worker` has events to deliver before the process ends."""
    _running.add(worker)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing import util

        util.Finalize(None, _end_all, exitpriority=0)


def ended(worker: Worker) -> None:
    """`worker` has nothing more to do."""
    _running.discard(worker)


def _end_all() -> None:
    """End every worker, all within the longest of their timeouts."""
    workers = list(_running)
    for worker in workers:
        worker.close()
    for worker in workers:
        with contextlib.suppress(Exception):
            worker.shutdown(0.0)


def _after_fork_in_child() -> None:
    _running.clear()
    for worker in list(_made):
        worker.after_fork_in_child()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
