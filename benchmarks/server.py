"""
How fast the server takes in events over HTTP, next to its database's own rate in the same run.

    make bench
    python -m benchmarks.server --events 10000000     # up to ten million stored events; takes long

A server in a process of its own, clients in others, requests of 512 events (what the SDK sends when all is well) and
of 8,192 (what it sends when there is a backlog). All store into one table, in turns with raw `executemany` and COPY
of the same kind of rows: machines differ, and so do hours, so read the ratios. Then the same for tables that are
full already, and how long reading takes there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import requests

from benchmarks.databases import LARGE_RUN, SMALL_RUN, Database, PostgreSQL, SQLite, fill, rows
from benchmarks.fleet import Fleet
from tests.postgres import running_postgres
from tests.support import LiveServer

_CLIENTS = (1, 2, 4, 8, 16)
_BATCH, _BACKLOG_BATCH = 512, 8192
#: Clients and events in a request of each measurement.
_LEVELS = (*((clients, _BATCH) for clients in _CLIENTS), (1, _BACKLOG_BATCH), (4, _BACKLOG_BATCH))
_SIZES = tuple(10**power for power in range(3, 8))
_READS = {
    "events, first page": "events/{run}",
    "events of a type": "events/{run}?stage_type=rerank",
    "runs": "runs",
    "traces": "traces/{run}",
    "summary": "summary/{run}",
    "report, 1,000 metrics": "debug/{run}?limit=1000",
}
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


def read_latencies(server: LiveServer, times: int) -> dict[str, float]:
    """Return the median milliseconds of each kind of read, for a run of 10,000 events and for one with half of all."""
    found = {}
    with requests.Session() as session:
        for name, path in _READS.items():
            for run, size in ((SMALL_RUN, "small run"), (LARGE_RUN, "large run")):
                if "{run}" not in path and run == LARGE_RUN:
                    continue
                took = []
                for _ in range(times):
                    started = time.perf_counter()
                    answer = session.get(f"{server.url}/api/stage/{path.format(run=run)}", timeout=600)
                    took.append((time.perf_counter() - started) * 1000)
                    answer.raise_for_status()
                found[f"{name}, {size}" if "{run}" in path else name] = statistics.median(took)
    return found


def show(figures: Sequence[Figures]) -> None:
    """Print rows of the table."""
    for row in figures:
        rate = f"{row['events_per_s']:8,.0f} events/s ({row['lowest']:,.0f} to {row['highest']:,.0f})"
        name = f"{row['what']}, {row['clients']} clients" if "clients" in row else row["what"]
        line = f"  {name:20} by {row['batch']:5,}  {rate:44}"
        if "clients" in row:
            line += f" {row['requests_per_s']:6.1f} requests/s  p50 {row['p50_ms']:7.1f}  p99 {row['p99_ms']:7.1f} ms"
            if row["server_cpu_us_per_event"] is not None:
                line += f"  CPU {row['server_cpu_us_per_event']:5.1f} µs"
            line += "".join(f"  {ratio:.2f} of raw {way}" for way, ratio in row["of_raw"].items())
            if row["put_off"]:
                line += f"  put off {row['put_off']} times"
        print(line, flush=True)


def growth(
    make: Callable[[], Database], folder: Path, fleet: Fleet, options: argparse.Namespace
) -> dict[int, dict[str, Any]]:
    """Measure with more and more events stored already; each size in a new database."""
    found: dict[int, dict[str, Any]] = {}
    for size in _SIZES:
        if size > options.events:
            break
        database = make()
        started = time.perf_counter()
        fill(database.address, size)
        filled = time.perf_counter() - started
        with serving(database, folder) as server:
            reads = read_latencies(server, options.reads) if options.reads else {}
            rates = measure(database, server, fleet, [(4, _BATCH)], options.rounds, options.sent)
        found[size] = {"ingestion": rates, "read_ms": reads}
        print(f"{database.name}, {size:,} events stored before (in {filled:.0f} s)")
        show(rates)
    if found:
        print(f"  ms to read with events stored:      {''.join(f'{size:>12,}' for size in found)}")
        for name in next(iter(found.values()))["read_ms"]:
            cells = "".join(f"{of_size['read_ms'][name]:12.1f}" for of_size in found.values())
            print(f"    {name:34}{cells}")
    return found


def main() -> None:
    """Print a table of medians and spreads, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sent", type=int, default=32_768, help="events that each measurement sends")
    parser.add_argument("--events", type=int, default=100_000, help="events stored already, at most; 0: only clients")
    parser.add_argument(
        "--reads", type=int, default=5, help="how often each read is asked; 0: none, a report of millions takes minutes"
    )
    parser.add_argument("--only", choices=("SQLite", "PostgreSQL"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()

    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = Fleet(max(_CLIENTS))
        stack.callback(fleet.close)
        makers: dict[str, Callable[[], Database]] = {}
        if options.only != "PostgreSQL":
            makers["SQLite"] = lambda: SQLite(folder)
        if options.only != "SQLite":
            postgres = stack.enter_context(running_postgres())
            makers["PostgreSQL"] = lambda: PostgreSQL(postgres)
        print(f"\nEvents stored per second: median of {options.rounds} rounds (lowest to highest)")
        for name, make in makers.items():
            database = make()
            with serving(database, folder) as server:
                fleet.send(server.port, clients=1, batch=_BATCH, events=5_120, run_id="bench-warm")
                clients = measure(database, server, fleet, _LEVELS, options.rounds, options.sent)
            print(name)
            show(clients)
            found[name] = {"clients": clients, "growth": growth(make, folder, fleet, options)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
