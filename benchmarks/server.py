"""
How fast the server takes in events over HTTP, next to its database's own rate in the same run.

    make bench ONLY=server

A server in a process of its own, clients in others, requests of 512 events (what the SDK sends when all is well) and
of 8,192 (what it sends when there is a backlog). All store into one table, in turns with raw `executemany` and COPY
of the same kind of rows: machines differ, and so do hours, so read the ratios. The clients' bodies are made beforehand;
what CPU they take of the machine is told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.databases import Database, PostgreSQL, SQLite, rows
from benchmarks.fleet import Fleet
from tests.postgres import running_postgres
from tests.support import LiveServer

_CLIENTS = (1, 2, 4, 8, 16)
BATCH, _BACKLOG_BATCH = 512, 8192
#: Clients and events in a request of each measurement.
_LEVELS = (*((clients, BATCH) for clients in _CLIENTS), (1, _BACKLOG_BATCH), (4, _BACKLOG_BATCH))
Figures = dict[str, Any]


@contextlib.contextmanager
def serving(database: Database, folder: Path) -> Iterator[LiveServer]:
    """Serve a database."""
    server = LiveServer(folder / "server", "--db", database.address)
    try:
        yield server
    finally:
        server.stop()


def cpu_s(process_id: int) -> float | None:
    """Return the CPU seconds of another process so far, where the system tells (Linux)."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    database: Database,
    server: LiveServer,
    fleet: Fleet,
    levels: Sequence[tuple[int, int]],
    rounds: int,
    events: int,
) -> list[Figures]:
    """Store in each raw way and over HTTP with each number of clients, in turns; return a row of figures for each."""
    raw: dict[tuple[str, int], list[float]] = {}
    served: dict[tuple[int, int], list[Figures]] = {level: [] for level in levels}
    for number in range(rounds):
        for batch in sorted({batch for _, batch in levels}):
            for way, rate in database.raw(rows(events, f"bench-raw-{number}"), batch).items():
                raw.setdefault((way, batch), []).append(rate)
        for clients, batch in levels:
            before = cpu_s(server.process.pid)
            ran = fleet.send(
                server.port, clients=clients, batch=batch, events=events, run_id=f"bench-served-{number}-{clients}"
            )
            after = cpu_s(server.process.pid)
            took = sorted(ran.took)
            served[clients, batch].append(
                {
                    "events_per_s": ran.events_per_s,
                    "requests_per_s": ran.requests_per_s,
                    "took_ms": [seconds * 1000 for seconds in took],
                    "put_off": ran.put_off,
                    "clients_cpu_us": ran.cpu_s * 1e6 / (len(took) * batch),
                    "cpu_us": (after - before) * 1e6 / (len(took) * batch) if before is not None and after else None,
                }
            )
    found: list[Figures] = [
        {"what": f"raw {way}", "batch": batch, **spread(rates)} for (way, batch), rates in raw.items()
    ]
    for (clients, batch), results in served.items():
        rates = [result["events_per_s"] for result in results]
        took = sorted(milliseconds for result in results for milliseconds in result["took_ms"])
        cpu = [result["cpu_us"] for result in results if result["cpu_us"] is not None]
        found.append(
            {
                "what": "server",
                "clients": clients,
                "batch": batch,
                **spread(rates),
                "requests_per_s": statistics.median(result["requests_per_s"] for result in results),
                "p50_ms": took[len(took) // 2],
                "p99_ms": took[len(took) * 99 // 100],
                "put_off": sum(result["put_off"] for result in results),
                "clients_cpu_us_per_event": statistics.median(result["clients_cpu_us"] for result in results),
                "server_cpu_us_per_event": statistics.median(cpu) if cpu else None,
                "of_raw": {
                    way: statistics.median(ours / theirs for ours, theirs in zip(rates, raw[way, size], strict=True))
                    for way, size in raw
                    if size == batch
                },
            }
        )
    return found


def spread(rates: Sequence[float]) -> Figures:
    """Return the median of rates, the lowest and the highest."""
    return {"events_per_s": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}


def show(figures: Sequence[Figures]) -> None:
    """Print rows of the table."""
    for row in figures:
        rate = f"{row['events_per_s']:8,.0f} events/s ({row['lowest']:,.0f} to {row['highest']:,.0f})"
        name = f"{row['what']}, {row['clients']} clients" if "clients" in row else row["what"]
        line = f"  {name:20} by {row['batch']:5,}  {rate:44}"
        if "clients" in row:
            line += f" {row['requests_per_s']:6.1f} requests/s  p50 {row['p50_ms']:7.1f}  p99 {row['p99_ms']:7.1f} ms"
            if row["server_cpu_us_per_event"] is not None:
                line += f"  CPU {row['server_cpu_us_per_event']:4.1f} µs"
            line += f" (clients {row['clients_cpu_us_per_event']:.1f})"
            line += "".join(f"  {ratio:.2f} of raw {way}" for way, ratio in row["of_raw"].items())
            if row["put_off"]:
                line += f"  put off {row['put_off']} times"
        print(line, flush=True)


@contextlib.contextmanager
def databases(folder: Path, only: str | None) -> Iterator[dict[str, Callable[[], Database]]]:
    """Yield what makes a new database of each kind, or of `only` one."""
    with contextlib.ExitStack() as stack:
        makers: dict[str, Callable[[], Database]] = {}
        if only != "PostgreSQL":
            makers["SQLite"] = lambda: SQLite(folder)
        if only != "SQLite":
            postgres = stack.enter_context(running_postgres())
            makers["PostgreSQL"] = lambda: PostgreSQL(postgres)
        yield makers


def main() -> None:
    """Print a table of medians and spreads, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sent", type=int, default=32_768, help="events that each measurement sends")
    parser.add_argument("--only", choices=("SQLite", "PostgreSQL"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()

    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = Fleet(max(_CLIENTS))
        stack.callback(fleet.close)
        print(f"\nEvents stored per second: median of {options.rounds} rounds (lowest to highest)")
        for name, make in stack.enter_context(databases(folder, options.only)).items():
            database = make()
            with serving(database, folder) as server:
                fleet.send(server.port, clients=1, batch=BATCH, events=5_120, run_id="bench-warm")
                found[name] = measure(database, server, fleet, _LEVELS, options.rounds, options.sent)
            print(name)
            show(found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
