"""
The commands and their arguments.

In:   the command line, and `EVALVAULT_*` variables.
Out:  calls to the modules that do the work; every expected error as one line on stderr and status 1.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from evalvault_sdk import __version__
from evalvault_sdk.cli import draw, spool
from evalvault_sdk.cli.draw import plain
from evalvault_sdk.cli.ingest import DatabaseTarget, ServerTarget, ingest_file
from evalvault_sdk.cli.source import DatabaseSource, ServerSource, Source
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

_Url = Annotated[str | None, typer.Option(envvar="EVALVAULT_API_URL", help=f"The server (default {_DEFAULT_URL}).")]
_Token = Annotated[str | None, typer.Option(envvar="EVALVAULT_API_TOKEN", help="The server's token.")]
_Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="The folder of all spools; by default EVALVAULT_SPOOL_DIR, or where the SDK has them."),
]
_Only = Annotated[str | None, typer.Option("--url", help="Only what goes to this server; by default all destinations.")]
_Force = Annotated[
    bool, typer.Option("--force", help="Also on a file system without locks: no service may be writing there.")
]
_DeadLetter = Annotated[bool, typer.Option("--dead-letter", help="Of what the server refused, instead.")]
_Db = Annotated[str | None, typer.Option(help="A database, instead of a server: a file, or postgresql://...")]


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except (EvalVaultError, OSError) as error:
        Console(stderr=True).print(f"[red]Error:[/] {plain(error)}", soft_wrap=True)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of so many bytes are done, on a terminal only; yield what is told of each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda size: progress.advance(bar, size)


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
    db: Annotated[
        str | None, typer.Option(help="Where events are kept: a file (default evalvault.db), or postgresql://...")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The port to listen on (default 8000); 0 is any.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that serve side by side; more than one needs PostgreSQL.")
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(help="The token that every request must bear; may be given several times. EVALVAULT_API_TOKEN"),
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="A file of hashed tokens, each with what it may do (see `token`).")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without a token.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, where that is another file.")] = None,
    thresholds: Annotated[Path | None, typer.Option(help="A JSON file of thresholds of metrics.")] = None,
    profile: Annotated[str | None, typer.Option(help="The profile of thresholds that holds: dev, prod.")] = None,
    relevance: Annotated[Path | None, typer.Option(help="A JSON file of relevant documents by test case.")] = None,
    rules: Annotated[Path | None, typer.Option(help="A TOML or YAML file of metrics of your own.")] = None,
    rate_limit: Annotated[float | None, typer.Option(help="Requests a second of each token, or address.")] = None,
    retain_days: Annotated[float | None, typer.Option(help="Days after which events are deleted.")] = None,
    retain_run_events: Annotated[int | None, typer.Option(help="Events of a run that are kept.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin of web pages that may ask; may be given several times.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="Lines of the log: text (default), or json.")] = None,
    log_requests: Annotated[
        bool | None, typer.Option("--log-requests", help="A line for every request, not only for failed ones.")
    ] = None,
) -> None:
    """
    Run the server: receive events, and answer questions about them.

    Every option, and more, can be set by a variable EVALVAULT_SERVER_..., EVALVAULT_SERVER_DB say; see the README.
    """
    with _clear_errors():
        from evalvault_sdk.server import ServerSettings, run
        from evalvault_sdk.server.store import without_password

        settings = ServerSettings.resolve(
            db=db,
            host=host,
            port=port,
            workers=workers,
            token=token or None,
            tokens_file=tokens_file,
            insecure=insecure,
            tls_cert=tls_cert,
            tls_key=tls_key,
            thresholds=thresholds,
            profile=profile,
            relevance=relevance,
            rules=rules,
            rate_limit=rate_limit,
            retain_days=retain_days,
            retain_run_events=retain_run_events,
            cors_origins=cors_origin or None,
            log_format=log_format,
            log_requests=log_requests,
        )
        run(
            settings,
            on_ready=lambda url: console.print(
                f"Database {plain(without_password(settings.db))}; API documentation at {url}/docs",
                highlight=False,
                soft_wrap=True,
            ),
        )


@app.command("token")
def make_token(
    name: Annotated[str, typer.Argument(help="Whose it is: what the server's log calls its bearer.")],
    runs: Annotated[
        list[str] | None, typer.Option(help="What the ids of its runs begin with; may be given several times.")
    ] = None,
    access: Annotated[list[str] | None, typer.Option(help="read, or write; by default both.")] = None,
) -> None:
    """Make a token: print it once, and the entry for the file of tokens, which has only its hash."""
    with _clear_errors():
        from evalvault_sdk.server.security import new_token, token_digest

        if access and not set(access) <= {"read", "write"}:
            raise EvalVaultError("--access must be read or write")
        token = new_token()
        lines = [
            "[[token]]",
            f"name = {json.dumps(name, ensure_ascii=False)}",
            f'sha256 = "{token_digest(token).hex()}"',
        ]
        lines += [f"runs = {json.dumps(runs, ensure_ascii=False)}"] if runs else []
        lines += [f"access = {json.dumps(access)}"] if access else []
        Console(stderr=True).print(
            "The token, for EVALVAULT_API_TOKEN of whoever sends or reads; it is not shown again:", highlight=False
        )
        typer.echo(token)
        Console(stderr=True).print("Add this to the server's file of tokens (--tokens-file):", highlight=False)
        typer.echo("\n".join(lines))


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
        target = DatabaseTarget(db) if db else ServerTarget(url, token)
        with _progress("Sending", file.stat().st_size) as advance:
            tally = ingest_file(file, target, advance)
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
    trace: Annotated[str | None, typer.Option(help="The trace to draw (default: the slowest).")] = None,
) -> None:
    """Show a run: its stages, the waterfall of one trace, failing metrics, recommendations."""
    with _clear_errors():
        if not run_id.isprintable():
            raise EvalVaultError("the run id is no readable text")
        source: Source = DatabaseSource(db) if db else ServerSource(url, token)
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


@app.command()
def doctor(
    url: Annotated[str | None, typer.Option(help="The server; by default what the SDK takes.")] = None,
    token: Annotated[str | None, typer.Option(help="The server's token; by default what the SDK takes.")] = None,
) -> None:
    """Find out why events do not arrive: settings, network, server, disk. Stores nothing."""
    with _clear_errors():
        from evalvault_sdk.cli.doctor import examine, resolve

        settings, shown = resolve(os.environ, api_url=url, token=token)
        draw.draw_settings(console, shown)
        problems = 0
        for finding in examine(settings, os.environ):
            draw.draw_finding(console, finding)
            problems += finding.state == "problem"
        if problems:
            raise typer.Exit(1)


spool_app = typer.Typer(help="What could not be delivered and waits on disk.", no_args_is_help=True)
app.add_typer(spool_app, name="spool")


def _spools(directory: Path | None, url: str | None) -> list[spool.Destination]:
    root = spool.root_of(spool.spool_settings(directory))
    found = spool.destinations(root, url)
    if not found:
        console.print(f"Nothing is spooled in {plain(root)}", highlight=False, soft_wrap=True)
    return found


@spool_app.command("status")
def spool_status(directory: _Dir = None, url: _Only = None) -> None:
    """Say how much waits for each destination."""
    with _clear_errors():
        for destination in _spools(directory, url):
            draw.draw_spool_status(console, destination)


@spool_app.command("list")
def spool_list(directory: _Dir = None, url: _Only = None) -> None:
    """List the segments, the oldest first."""
    with _clear_errors():
        for destination in _spools(directory, url):
            draw.draw_spool_segments(console, destination)


@spool_app.command("replay")
def spool_replay(
    directory: _Dir = None,
    url: _Only = None,
    token: _Token = None,
    to: Annotated[str | None, typer.Option(help="Another server than the one that it was recorded for.")] = None,
    dead_letter: _DeadLetter = False,
    force: _Force = False,
) -> None:
    """Deliver what ended processes left. What running ones hold is theirs to deliver."""
    with _clear_errors():
        found = _spools(directory, url)
        spool.check_replay(found, to=to, token=token)
        complete = True
        for destination in found:
            settings = spool.spool_settings(directory, to or destination.address, token)
            total = 0 if dead_letter else sum(kept.size for kept in destination.left_over())
            with _progress("Delivering", total) as advance:
                result = spool.replay(destination, settings, advance, dead_letter=dead_letter, force=force)
            draw.draw_replayed(console, destination, result)
            complete = complete and result.complete
        if not complete:
            raise typer.Exit(1)


@spool_app.command("export")
def spool_export(
    file: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    directory: _Dir = None,
    url: _Only = None,
    dead_letter: _DeadLetter = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Copy the events into a file that can be ingested elsewhere; the spool stays as it is."""
    with _clear_errors():
        found = _spools(directory, url)
        if not found:
            return
        result = spool.export(found, file, dead_letter=dead_letter, force=force)
        what = "refused events" if dead_letter else "events"
        console.print(f"{result.events:,} {what} copied, {result.damaged:,} damaged lines left out", highlight=False)
        if result.in_use:
            console.print(f"  {result.in_use:,} of them running services will deliver as well", highlight=False)


@spool_app.command("purge")
def spool_purge(
    directory: _Dir = None,
    url: _Only = None,
    dead_letter: _DeadLetter = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: _Force = False,
) -> None:
    """Delete what ended processes left, undelivered."""
    with _clear_errors():
        settings = spool.spool_settings(directory)
        purges = [spool.Purge.of(destination, dead_letter=dead_letter) for destination in _spools(directory, url)]
        for purge in purges:
            console.print(f"{purge.events:,} events for {plain(purge.destination.address)}", highlight=False)
        total = sum(purge.events for purge in purges)
        if any(purge.segments or purge.events for purge in purges):
            if not yes:
                typer.confirm(f"Delete {total:,} events for good?", abort=True)
            deleted = sum(purge.run(settings, force=force) for purge in purges)
            console.print(f"{deleted:,} events deleted", highlight=False)
            if deleted < total:
                raise EvalVaultError(
                    f"{total - deleted:,} events were not deleted: another process has adopted them, or the file "
                    "system has no locks (then stop the services that write there, and give --force)"
                )
        elif purges:
            console.print("Nothing to delete", highlight=False)
