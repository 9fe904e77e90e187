"""
What recording costs, next to the OpenTelemetry SDK doing the same work in the same run.

    make bench

Every SDK runs in a process of its own, in turn, several rounds; a sink in another process counts what
arrived, and a run in which anything is missing does not count. Machines differ: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import requests

from benchmarks.workload import STAGES_PER_REQUEST, WORKLOADS


def measure(name: str, port: int, count: int) -> dict[str, float]:
    """Run one workload once; return its figures in microseconds per stage."""
    command = [sys.executable, "-m", "benchmarks.workload", name, str(port), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost: dict[str, Any] = json.loads(done.stdout)
    arrived = requests.get(f"http://127.0.0.1:{port}/count", timeout=120).json()
    expected = (count + 100) * STAGES_PER_REQUEST
    if arrived != expected:
        raise SystemExit(f"{name}: {arrived} of {expected} stages arrived: this run does not count\n{done.stderr}")
    took = sorted(nanoseconds / 1000 / STAGES_PER_REQUEST for nanoseconds in cost["request_ns"])
    return {
        "caller p50": took[len(took) // 2],
        "caller p99": took[len(took) * 99 // 100],
        "total CPU": cost["cpu_s"] * 1e6 / (count * STAGES_PER_REQUEST),
    }


def main() -> None:
    """Print a table of medians and spreads, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--requests", type=int, default=4000, help="requests of five stages in each run")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    with subprocess.Popen([sys.executable, "-m", "benchmarks.sink"], stdout=subprocess.PIPE, text=True) as sink:
        try:
            assert sink.stdout is not None
            port = int(sink.stdout.readline())
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WORKLOADS}
            for _ in range(options.rounds):
                for name in WORKLOADS:
                    rounds[name].append(measure(name, port, options.requests))
        finally:
            sink.terminate()

    print(f"µs per stage: median of {options.rounds} rounds (lowest to highest), {options.requests} requests each")
    measures = list(rounds["evalvault-sdk"][0])
    medians: dict[str, dict[str, float]] = {}
    for name, results in rounds.items():
        medians[name] = {what: statistics.median(result[what] for result in results) for what in measures}
        cells = []
        for what in measures:
            values = [result[what] for result in results]
            cells.append(f"{what} {medians[name][what]:7.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"  {name:18} " + "  ".join(cells))
    ours, theirs = medians["evalvault-sdk"], medians["opentelemetry-sdk"]
    ratios = "  ".join(f"{what} 1/{theirs[what] / ours[what]:.1f}" for what in measures)
    print(f"  of OpenTelemetry's: {ratios}")


if __name__ == "__main__":
    main()
