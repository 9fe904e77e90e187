"""
The commands and their arguments.

In:   the command line, and `EVALVAULT_*` variables.
Out:  calls to the modules that do the work; every expected error as one line on stderr and status 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from evalvault_sdk import __version__
from evalvault_sdk.cli import draw
from evalvault_sdk.cli.draw import plain
from evalvault_sdk.cli.ingest import FileTarget, ServerTarget, ingest_file
from evalvault_sdk.cli.source import FileSource, ServerSource, Source
from evalvault_sdk.errors import EvalVaultError

app = typer.Typer(
    help="Receive, keep and look at the stages of RAG programs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()
_DEFAULT_URL = "http://localhost:8000"
#: Refused lines named at most.
_MAX_NAMED = 20

_Url = Annotated[str | None, typer.Option(envvar="EVALVAULT_API_URL", help=f"The server. [default: {_DEFAULT_URL}]")]
_Token = Annotated[str | None, typer.Option(envvar="EVALVAULT_API_TOKEN", help="The server's token.")]
_Db = Annotated[str | None, typer.Option(help="A database file, instead of a server.")]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except (EvalVaultError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/] {plain(error)}", soft_wrap=True)
        raise typer.Exit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    db: Annotated[str, typer.Option(help="The database file; made if it is not there.")] = "evalvault.db",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    token: _Token = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a token.")] = False,
) -> None:
    """Run the server: receive events, and answer questions about them."""
    with _clear_errors():
        from evalvault_sdk.server import create_app, run
        from evalvault_sdk.server.security import check_exposure, check_token_setting

        token = check_token_setting(token)
        check_exposure(host, token, insecure=insecure)
        run(
            create_app(db, token=token),
            host=host,
            port=port,
            on_ready=lambda url: console.print(
                f"Database {plain(db)}; API documentation at {url}/docs", highlight=False
            ),
        )


@app.command()
def demo(
    db: Annotated[Path, typer.Option(help="The database file; made if it is not there.")] = Path("evalvault-demo.db"),
) -> None:
    """Trace a real RAG program through a real server, and show what the server says of it."""
    with _clear_errors():
        from evalvault_sdk.cli.demo import run_demo

        if not run_demo(console, db):
            raise EvalVaultError("not everything that was recorded was stored")


@app.command()
def ingest(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A JSONL file: one event a line.")],
    url: _Url = None,
    db: _Db = None,
    token: _Token = None,
) -> None:
    """Send a file of events to a server, or into a database file."""
    with _clear_errors():
        target = FileTarget(db) if db else ServerTarget(url, token)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("Sending", total=file.stat().st_size)
            tally = ingest_file(file, target, lambda size: progress.advance(bar, size))
        console.print(f"{tally.stored:,} events stored, {len(tally.refused):,} refused", highlight=False)
        for number, reason in tally.refused[:_MAX_NAMED]:
            console.print(f"  line {number}: {plain(reason)}", highlight=False)
        if len(tally.refused) > _MAX_NAMED:
            console.print(f"  ... and {len(tally.refused) - _MAX_NAMED:,} more", highlight=False)
        if tally.refused:
            raise typer.Exit(1)


@app.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The run.")],
    url: _Url = None,
    db: _Db = None,
    token: _Token = None,
    trace: Annotated[str | None, typer.Option(help="The trace to draw. [default: the slowest]")] = None,
) -> None:
    """Show a run: its stages, the waterfall of one trace, failing metrics, recommendations."""
    with _clear_errors():
        if not run_id.isprintable():
            raise EvalVaultError("the run id is no readable text")
        source: Source = FileSource(db) if db else ServerSource(url, token)
        draw.draw_stage_types(console, source.summary(run_id))
        report = source.debug(run_id)
        trace_id = trace or report["run_summary"]["slowest_trace_id"]
        if trace_id is not None:
            events = source.events(run_id, trace_id=trace_id)
            if not events:
                raise EvalVaultError(f"the run has no trace {trace_id}")
            draw.draw_waterfall(console, events, f"Trace {trace_id}")
        else:
            draw.draw_waterfall(console, draw.slowest_tree(source.events(run_id)), "Slowest stages (without trace ids)")
        draw.draw_failing(console, report)
        draw.draw_recommendations(console, report)
