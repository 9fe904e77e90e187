"""
Follow the process: what becomes of workers when it ends, and when it forks.

In:   workers as they are made, started and ended; the interpreter's own hooks.
Out:  every started worker ended with the process, within its timeout; every worker of a forked child told.

Hooks: `atexit` (also for exceptions, `sys.exit`, daemon threads); for children that leave without running `atexit`
the finalizers of multiprocessing and of billiard, and a signal of Celery, whose pool runs no finalizers either;
`os.register_at_fork`; and SIGTERM for a program that asks for it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from evalvault_sdk.log import warn

if TYPE_CHECKING:
    from evalvault_sdk.delivery.worker import Worker

_made: weakref.WeakSet[Worker] = weakref.WeakSet()
#: Workers that still have to be ended when the process ends.
_running: set[Worker] = set()
#: Packages whose finalizers call us at the end of this process.
_followed: set[str] = set()


def made(worker: Worker) -> None:
    """From now on `worker` is told of forks."""
    _made.add(worker)


def started(worker: Worker) -> None:
    """From now on `worker` has events to deliver before the process ends."""
    _running.add(worker)
    for package in ("multiprocessing", "billiard"):
        process = sys.modules.get(f"{package}.process")
        if process is not None and package not in _followed and _is_child(process):
            _followed.add(package)
            sys.modules[f"{package}.util"].Finalize(None, _end_all, exitpriority=0)
    leaving = getattr(sys.modules.get("celery.signals"), "worker_process_shutdown", None)
    if leaving is not None:
        leaving.connect(_on_celery_exit)


def _is_child(process: ModuleType) -> bool:
    if hasattr(process, "parent_process"):
        return process.parent_process() is not None
    return type(process.current_process()).__name__ != "_MainProcess"  # billiard has no parent_process


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
            worker.end()


def _all_made() -> list[Worker]:
    while True:
        try:
            return list(_made)
        except RuntimeError:  # another thread has just made one, or let one go
            continue


def _brace_all() -> None:
    """Let every worker expect the end, also those that have recorded nothing so far; all within one timeout."""
    workers = _all_made()
    until = time.monotonic() + max((worker.shutdown_timeout_s for worker in workers), default=0.0)
    for worker in workers:
        with contextlib.suppress(Exception):
            worker.brace(until)


def _on_celery_exit(**_: Any) -> None:
    _end_all()


def handle_sigterm() -> None:
    """From now on deliver what was recorded when SIGTERM comes, then do what was done before."""
    before = signal.getsignal(signal.SIGTERM)
    if isinstance(before, _OnSigterm) or before == signal.SIG_IGN:
        return  # it is handled, or ends nothing
    if before is None:
        warn("SIGTERM is handled by something that is not Python: call the tracer's shutdown from there")
        return
    try:
        signal.signal(signal.SIGTERM, _OnSigterm(before))
    except ValueError:
        warn("SIGTERM can be handled from the main thread only: make the tracer with handle_sigterm there")


@attrs.frozen
class _OnSigterm:
    """
    Our handler. Each knows its own `before`: the program may put another between two of ours, or put an old one back.
    """

    before: Callable[[int, FrameType | None], Any] | int

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if callable(self.before):
            # The program will end in its own way and time, and record more until then. How it ends is not for us to
            # know, so from here on nothing is in memory alone.
            with contextlib.suppress(Exception):
                _brace_all()
            self.before(number, frame)
        else:
            _end_all()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _after_fork_in_child() -> None:
    _running.clear()
    _followed.clear()
    for worker in _all_made():
        worker.after_fork_in_child()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
