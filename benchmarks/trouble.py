"""
How long recording takes while delivery is in trouble: the host's threads must not be held.

    make bench

In a process of its own for each trouble, 100,000 stages are recorded one after another, as fast as Python can; the
table has the median, the 99th and 99.9th percentile and the slowest of them, in microseconds. What the interpreter
itself does to a thread is in the first row: the same stages with nothing recorded (`enabled=False`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from evalvault_sdk import StageTracer


def no_trouble(port: int) -> dict[str, Any]:
    """Return settings for the yardstick: nothing is recorded."""
    return {"enabled": False}


def outage(port: int) -> dict[str, Any]:
    """Return settings for a server that refuses connections: events go to disk."""
    return {}


def outage_with_a_journal(port: int) -> dict[str, Any]:
    """Return settings for the same with every event on disk before recording returns."""
    return {"durability": "journal"}


def full_queue(port: int) -> dict[str, Any]:
    """Return settings for a queue that is always full: new events are dropped and counted."""
    return {"durability": "memory", "max_queue_events": 1000}


def overflow_to_disk(port: int) -> dict[str, Any]:
    """Return settings for a queue that is always full: new events are written by the recording thread."""
    return {"max_queue_events": 1000}


def full_disk(port: int) -> dict[str, Any]:
    """Let every write fail, as on a full disk: events stay in memory as far as its bound allows."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return {"max_queue_events": 20_000}


TROUBLES = {
    function.__name__.replace("_", " "): function
    for function in (no_trouble, outage, outage_with_a_journal, full_queue, overflow_to_disk, full_disk)
}


def record(name: str, count: int, port: int) -> None:
    """Record in trouble, and print how long each recording took, sorted, in nanoseconds, as the figures of a table."""
    tracer = StageTracer("bench", f"http://127.0.0.1:{port}", **TROUBLES[name](port), shutdown_timeout_s=0.1)
    took = []
    for number in range(count):
        started = time.perf_counter_ns()
        with tracer.stage("retrieval") as stage:
            stage.set(query="이 보험의 사망보험금은 얼마인가요?", number=number, scores=[0.91, 0.88, 0.83])
        took.append(time.perf_counter_ns() - started)
    stats = tracer.stats()
    took.sort()
    places = {"p50": count // 2, "p99": count * 99 // 100, "p99.9": count * 999 // 1000, "slowest": count - 1}
    figures = {place: took[index] / 1000 for place, index in places.items()}
    balanced = stats.recorded == stats.delivered + stats.pending + stats.rejected + sum(stats.dropped.values())
    print(json.dumps({**figures, "balanced": balanced, "stats": str(stats)}), flush=True)
    os._exit(0)  # how it ends is measured elsewhere


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--only", choices=TROUBLES, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        record(options.only, options.count, options.port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens on it: every connection is refused
        port = str(taken.getsockname()[1])
        print(f"\nµs per recording while delivery is in trouble, of {options.count:,}")
        for name in TROUBLES:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "benchmarks.trouble", "--only", name, "--port", port]
                done = subprocess.run(
                    [*command, "--count", str(options.count)],
                    env={**os.environ, "EVALVAULT_SPOOL_DIR": folder},
                    capture_output=True,
                    text=True,
                    check=True,
                )
            answer = json.loads(done.stdout)
            if not answer["balanced"]:
                raise SystemExit(f"{name}: the account does not balance: {answer['stats']}")
            cells = "  ".join(f"{place} {answer[place]:9.1f}" for place in ("p50", "p99", "p99.9", "slowest"))
            print(f"  {name:22} {cells}   {answer['stats']}")


if __name__ == "__main__":
    main()
