"""
Does recording cost the same whether one thread does it or 64, with one tracer or a hundred?

    make bench ONLY=scale

In a process of its own for each row, the same requests (`benchmarks.workload`) are recorded and delivered to a sink in
another process. The table has the CPU of the process per delivered stage, and how many times that of one thread with
one tracer it is; rounds are interleaved, a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks.recording import server
from benchmarks.situations import SITUATIONS
from benchmarks.workload import STAGE_TYPES, STAGES_PER_REQUEST, attributes_of
from evalvault_sdk import StageTracer

#: Threads and tracers.
_ROWS = ((1, 1), (4, 1), (16, 1), (64, 1), (1, 10), (1, 100), (64, 100))
_REQUESTS = 6400


def record(threads: int, tracers: int, port: int) -> None:
    """Record in so many threads, with the tracers in turn, and print the CPU per stage in microseconds."""
    requests = attributes_of(200)
    made = [
        StageTracer(f"bench-{number}", f"http://127.0.0.1:{port}", max_queue_events=10**6) for number in range(tracers)
    ]

    def work(first: int, count: int) -> None:
        for number in range(first, first + count):
            tracer = made[number % tracers]
            root, *inner = requests[number % 200 * STAGES_PER_REQUEST :][:STAGES_PER_REQUEST]
            with tracer.stage("request") as stage:
                stage.set(**root)
                for stage_type, attributes in zip(STAGE_TYPES, inner, strict=True):
                    with tracer.stage(stage_type) as stage:
                        stage.set(**attributes)

    def in_threads(count: int) -> None:
        share = count // threads
        running = [threading.Thread(target=work, args=(number * share, share)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        for tracer in made:
            if not (report := tracer.flush(60)).complete:
                raise SystemExit(f"not all has arrived: {report}")

    in_threads(max(threads, tracers))
    cpu_s, started = time.process_time(), time.monotonic()
    in_threads(_REQUESTS)
    stages = _REQUESTS * STAGES_PER_REQUEST
    figures = {
        "cpu_us": (time.process_time() - cpu_s) / stages * 1e6,
        "per_s": stages / (time.monotonic() - started),
    }
    print(json.dumps(figures), flush=True)
    os._exit(0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        record(*options.only)
    found: dict[tuple[int, int], list[dict[str, float]]] = {row: [] for row in _ROWS}
    for _ in range(options.rounds):
        for row in _ROWS:
            with server(SITUATIONS["healthy"]) as port, tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "benchmarks.scale", "--only", *map(str, (*row, port))]
                environment = {**os.environ, "EVALVAULT_SPOOL_DIR": folder}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[row].append(json.loads(done.stdout))
    print(f"\nCPU of the process per delivered stage, of {_REQUESTS * STAGES_PER_REQUEST:,} stages\n")
    print(
        "| threads | tracers | CPU, µs | times one thread and tracer | stages/s |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for row, rounds in found.items():
        times = statistics.median(
            here["cpu_us"] / first["cpu_us"] for here, first in zip(rounds, found[_ROWS[0]], strict=True)
        )
        cpu_us, per_s = (statistics.median(here[name] for here in rounds) for name in ("cpu_us", "per_s"))
        print(f"| {row[0]} | {row[1]} | {cpu_us:.1f} | {times:.2f} | {per_s:,.0f} |")


if __name__ == "__main__":
    main()
