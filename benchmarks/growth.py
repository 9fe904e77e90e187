"""
What grows with the events that are stored: how long storing and reading take with a thousand, and with ten million.

    make bench ONLY=growth               # SQLite up to ten million events, PostgreSQL up to one million; takes long
    python -m benchmarks.growth --only SQLite --events 1000000

Each size in a new database, filled by the store's own `save` without a server; half of the events are one run, the
others runs of 10,000. Then a server, asked over HTTP by one client, and sent requests of 512 events by four. What grows
in a straight line takes ten times as long for ten times as many; what is asked of a page or sent in a request should
not grow at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from benchmarks.databases import LARGE_RUN, SMALL_RUN, Database, fill
from benchmarks.fleet import Fleet
from benchmarks.server import BATCH, databases, measure, serving
from tests.support import LiveServer

_CLIENTS = 4
_SIZES = tuple(10**power for power in range(3, 8))
_LARGEST = {"SQLite": 10_000_000, "PostgreSQL": 1_000_000}
#: Beyond so many events a report, which goes through all of them, is not asked for: it takes minutes.
_REPORTED = 1_000_000
_READS = {
    "first page": "events/{run}",
    "page in the middle": "events/{run}?cursor={middle}",
    "first page of a type": "events/{run}?stage_type=rerank",
    "traces": "traces/{run}",
    "summary": "summary/{run}",
    "report, 1,000 metrics": "debug/{run}?limit=1000",
    "first page, run of 10,000": f"events/{SMALL_RUN}",
    "summary, run of 10,000": f"summary/{SMALL_RUN}",
    "runs": "runs",
}
Figures = dict[str, Any]


def read_ms(server: LiveServer, size: int, times: int) -> dict[str, float]:
    """Return the median milliseconds of each kind of read, with `size` events stored; each was asked once before."""
    found = {}
    with requests.Session() as session:
        for name, path in _READS.items():
            if name.startswith("report") and size > _REPORTED:
                continue
            url = f"{server.url}/api/stage/{path.format(run=LARGE_RUN, middle=size // 2)}"
            took = []
            for _ in range(1 + times):
                started = time.perf_counter()
                answer = session.get(url, timeout=600)
                took.append((time.perf_counter() - started) * 1000)
                answer.raise_for_status()
            found[name] = statistics.median(took[1:])
    return found


def grow(make: Callable[[], Database], folder: Path, fleet: Fleet, options: argparse.Namespace) -> dict[int, Figures]:
    """Measure with more and more events stored; return the figures of each size."""
    found: dict[int, Figures] = {}
    for size in _SIZES:
        database = make()
        if size > min(options.events, _LARGEST[database.name]):
            break
        figures: Figures = {"filled, thousand events/s": fill(database.address, size) / 1000}
        with serving(database, folder) as server:
            figures.update({f"{name}, ms": taken for name, taken in read_ms(server, size, options.reads).items()})
            fleet.send(server.port, clients=1, batch=BATCH, events=5_120, run_id="bench-warm")
            rows = measure(database, server, fleet, [(_CLIENTS, BATCH)], options.rounds, options.sent)
        for row in rows:
            figures[f"{row['what']}, thousand events/s"] = row["events_per_s"] / 1000
        found[size] = figures
        print(f"  {size:,} events", flush=True)
    return found


def show(found: dict[int, Figures]) -> None:
    """Print a line of each figure, and how many times the second largest size's the largest's is."""
    sizes = list(found)
    print(f"  {'with events stored':38}{''.join(f'{size:>12,}' for size in sizes)}   last step")
    for name in found[sizes[0]]:
        values = [found[size].get(name) for size in sizes]
        cells = "".join(f"{'':>12}" if value is None else f"{value:12.1f}" for value in values)
        known = [value for value in values if value is not None]
        step = f"x {known[-1] / known[-2]:5.2f}" if len(known) > 1 else ""
        print(f"  {name:38}{cells}     {step}", flush=True)


def main() -> None:
    """Print a table for each database."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--events", type=int, default=max(_LARGEST.values()), help="events stored at most")
    parser.add_argument("--rounds", type=int, default=3, help="of sending")
    parser.add_argument("--sent", type=int, default=32_768, help="events that each round sends")
    parser.add_argument("--reads", type=int, default=5, help="how often each read is asked")
    parser.add_argument("--only", choices=tuple(_LARGEST))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args()

    found: dict[str, dict[int, Figures]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = Fleet(_CLIENTS)
        stack.callback(fleet.close)
        for name, make in stack.enter_context(databases(folder, options.only)).items():
            print(name, flush=True)
            found[name] = grow(make, folder, fleet, options)
            show(found[name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
