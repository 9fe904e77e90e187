"""
The demo: a real RAG program, traced through a real server.

In:   where the database shall be.
Out:  a run in it; what the API says of that run, on the terminal.

The server runs in a process of its own and is ended whatever happens. The program is
`examples/rag_tracing/custom_rag_example.py`, the file itself, from the checkout or from the wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import Progress

from evalvault_sdk.cli.draw import (
    draw_failing,
    draw_recommendations,
    draw_stage_types,
    draw_waterfall,
    plain,
)
from evalvault_sdk.cli.source import ServerSource
from evalvault_sdk.errors import EvalVaultError, MissingDependencyError

_PROGRAM = "custom_rag_example.py"
_START_TIMEOUT_S = 30.0


def run_demo(console: Console, db: Path) -> bool:
    """Run the demo; return whether everything that was recorded was delivered and stored."""
    run_id = f"demo-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    with _ended_by_signals(), _server(db) as url:
        # The program makes its tracer when it is loaded, as programs do: from its environment.
        os.environ.update(EVALVAULT_API_URL=url, EVALVAULT_RUN_ID=run_id)
        os.environ.pop("EVALVAULT_SDK_DISABLED", None)
        with console.status("Indexing the docstrings of Python's standard library ..."):
            program = _load_program()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("Answering questions", total=len(program.QUESTIONS))
            started = time.perf_counter()
            stats = program.main(lambda question, text: progress.advance(bar))
            took_s = time.perf_counter() - started
        source = ServerSource(url, None)
        summary = source.summary(run_id)
        report = source.debug(run_id)
        trace_id = report["run_summary"]["slowest_trace_id"]

        console.print(f"{len(program.QUESTIONS)} questions answered in {took_s:.1f} s, index included.\n")
        draw_stage_types(console, summary)
        if trace_id is not None:
            draw_waterfall(console, source.events(run_id, trace_id=trace_id), f"Trace {trace_id}")
        draw_failing(console, report)
        draw_recommendations(console, report)
        stored = summary["total_events"]
        console.print(f"\n[bold]The SDK's account:[/] {stats}; stored, says the server: {stored:,}")
        console.print(f"[bold]The database:[/] {plain(str(db.resolve()))}")
        console.print(f"Look further: [bold]evalvault-sdk show {run_id} --db {plain(str(db))}[/]")
        console.print(
            f"         or: [bold]evalvault-sdk serve --db {plain(str(db))}[/], then http://localhost:8000/docs"
        )
        return bool(stats.complete and stored == stats.recorded)


def _load_program() -> ModuleType:
    here = Path(__file__).resolve()
    candidates = (here.parent / _PROGRAM, here.parents[2] / "examples" / "rag_tracing" / _PROGRAM)
    for path in candidates:
        if path.is_file():
            spec = importlib.util.spec_from_file_location("evalvault_demo_program", path)
            assert spec is not None  # noqa: S101 - a .py file has one
            assert spec.loader is not None  # noqa: S101
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise MissingDependencyError.for_extra("the demo", "demo", error) from error
            return module
    raise EvalVaultError(f"the demo's program {_PROGRAM} is missing from this installation: install it again")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does: by an exception, so that the server is ended too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _server(db: Path) -> Iterator[str]:
    """Run a server on `db` in a process of its own; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evalvault_sdk.cli", "serve", "--db", str(db), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "EVALVAULT_API_TOKEN"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(process, port)
        os.environ.pop("EVALVAULT_API_TOKEN", None)
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = f"127.0.0.1,{os.environ.get(name, '')}"  # this machine is not behind the proxy
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _wait_until_ready(process: subprocess.Popen[Any], port: int) -> None:
    import requests

    session = requests.Session()
    session.trust_env = False  # no proxy on the way to this machine
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            output = process.communicate()[0].decode(errors="replace")
            raise EvalVaultError(f"the server did not start:\n{output.strip()}")
        with contextlib.suppress(requests.RequestException):
            if session.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                return
        time.sleep(0.1)
    raise EvalVaultError(f"the server was not ready within {_START_TIMEOUT_S:.0f} s")
