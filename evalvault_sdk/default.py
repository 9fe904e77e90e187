"""
The tracer of programs that carry none around: `evalvault_sdk.configure(...)`, then `stage(...)` anywhere.

In:   one call of `configure`, before or after code was decorated; or the variable `EVALVAULT_RUN_ID` and no call.
Out:  what a `StageTracer` gives, as functions of the package.

What is decorated while a module is imported looks its tracer up when it is called. Without a configuration
nothing is recorded, and one line of the log says so.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import attrs

from evalvault_sdk.capture.context import Trace
from evalvault_sdk.capture.nostage import NOWHERE
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.late import load
from evalvault_sdk.log import warn
from evalvault_sdk.tracer import StageTracer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from evalvault_sdk.config import SettingArguments
    from evalvault_sdk.delivery.account import FlushReport, Stats


class _DefaultRecorder(Recorder):
    """A recorder that does as the one of the configured tracer does."""

    __slots__ = ("_configuring", "_is_configuring", "_unconfigured", "tracer")

    def __init__(self) -> None:
        super().__init__("", NOWHERE.setup.sink)
        self.tracer: StageTracer | None = None
        self._unconfigured = self._own
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Begin with a lock of one's own: another thread of the parent may have held this one."""
        self._is_configuring = False
        self._configuring = threading.RLock()  # reentrant: a finalizer may record in the middle of it

    def use(self, tracer: StageTracer) -> None:
        """Record with `tracer` from now on. The one before delivers what it has, and ends if nobody else keeps it."""
        with self._configuring:
            self.tracer = tracer
            self.follow(tracer._recorder._own)

    def record(self, fields: dict[str, Any], trace: Trace | None = None) -> bool:
        """Record an event with the configured tracer."""
        self.make_ready()
        if not self.enabled:
            return False
        if not fields.get("run_id"):
            fields["run_id"] = self.run_id  # the stage began before it was known
        return super().record(fields, trace)

    def draws(self, trace_id: str | None) -> bool:
        """Whether a trace is recorded from its beginning to its end."""
        self.make_ready()
        return super().draws(trace_id)

    def make_ready(self) -> None:
        """Configure from the environment, if nobody has called `configure` before the first use."""
        if self._own is not self._unconfigured or self._watches:
            return
        with self._configuring:
            if self._own is not self._unconfigured or self._is_configuring:
                return
            self._is_configuring = True
            try:
                if os.environ.get("EVALVAULT_RUN_ID") or os.environ.get("EVALVAULT_SDK_DISABLED"):
                    self.use(StageTracer())
                else:
                    warn("stages are not recorded: call evalvault_sdk.configure(run_id=...), or set EVALVAULT_RUN_ID")
            except ConfigurationError as error:
                warn("stages are not recorded: %s", error)
            except Exception as error:  # noqa: BLE001 - no thread to be had, for example: not the host's problem
                warn("stages are not recorded (%s)", type(error).__name__)
            finally:
                self._is_configuring = False
                if self._own is self._unconfigured:  # it is not tried again
                    self.follow(attrs.evolve(self._unconfigured, enabled=False))


class DefaultTracer(Stages):
    """The one behind the functions of the package."""

    _recorder: _DefaultRecorder
    _stays_off = False

    def __init__(self) -> None:
        super().__init__(_DefaultRecorder())

    def configure(
        self, run_id: str | None = None, api_url: str | None = None, **settings: Unpack[SettingArguments]
    ) -> StageTracer:
        """
        Make the tracer that the functions of this package record with, and return it.

        Takes what `StageTracer` takes. May be called again: what is recorded later goes with the new settings.
        Raises `ConfigurationError`.
        """
        tracer = StageTracer(run_id, api_url, **settings)
        self._recorder.use(tracer)
        return tracer

    def flush(self, timeout: float = 10.0) -> FlushReport:
        """Deliver what was recorded before this call; wait at most `timeout` seconds. See `StageTracer.flush`."""
        tracer = self._recorder.tracer
        return _nothing() if tracer is None else tracer.flush(timeout)

    def shutdown(self, timeout: float | None = None) -> FlushReport:
        """Deliver what was recorded and end. See `StageTracer.shutdown`."""
        self._recorder.end_sources()
        tracer = self._recorder.tracer
        return _nothing() if tracer is None else tracer.shutdown(timeout)

    def stats(self) -> Stats:
        """Return what became of all events recorded so far. See `StageTracer.stats`."""
        tracer = self._recorder.tracer
        return _nothing() if tracer is None else tracer.stats()


def _nothing() -> FlushReport:
    """Return the account of a program that has configured nothing."""
    load("evalvault_sdk.delivery.account")
    from evalvault_sdk.delivery.account import FlushReport

    return FlushReport(recorded=0, delivered=0, spooled=0, queued=0, in_flight=0, rejected=0, dropped={}, in_time=True)


default = DefaultTracer()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=default._recorder.after_fork_in_child)

if os.environ.get("EVALVAULT_RUN_ID"):
    # The tracer will be made by the first stage, unless `configure` is called: no request is to wait for an import.
    load("evalvault_sdk.assembly")
