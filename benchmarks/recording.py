"""
Measure SDKs side by side: what recording costs, and what becomes of what was recorded.

In:   situations, a number of rounds.
Out:  for each situation and SDK the figures of every round.

Every SDK runs in a process of its own, one after the other, round by round: what the machine does besides hits all of
them. A sink in another process counts what arrived.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from urllib.request import urlopen

from packaging.requirements import Requirement

from benchmarks.situations import FRAMEWORKS, Situation
from benchmarks.subjects import QUEUES, SUBJECTS, Subject
from benchmarks.workload import STAGES_PER_REQUEST

#: A process that takes longer is ended, and has no figures, like one that fails.
_TIMEOUT_S = 90.0
Figures = dict[str, float]


@contextlib.contextmanager
def server(situation: Situation) -> Iterator[int]:
    """Run the server that a situation wants; give its port."""
    if situation.server == "refuses":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens on it: every connection is refused
            yield taken.getsockname()[1]
        return
    latency_ms = -1 if situation.server == "stalls" else situation.latency_ms
    command = [sys.executable, "-m", "benchmarks.sink", str(latency_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
        try:
            assert sink.stdout is not None
            yield int(sink.stdout.readline())
        finally:
            sink.terminate()


def run(name: str, situation: Situation) -> Figures:
    """Let one SDK do it once; return its figures."""
    with server(situation) as port, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.run", name, situation.name, str(port)]
        environment = {**os.environ, **QUEUES, "EVALVAULT_SPOOL_DIR": folder}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {}
        ended_at = time.monotonic()
        if done.returncode not in (0, -signal.SIGKILL) or not done.stdout:
            print(f"{name}, {situation.name}: {done.stderr}", file=sys.stderr)
            return {}
        cost = json.loads(done.stdout.splitlines()[-1])
        found = {"arrived": 0, "wire_bytes": 0}
        if situation.server == "answers":
            with urlopen(f"http://127.0.0.1:{port}/count", timeout=60) as answer:
                found = json.loads(answer.read())
    return figures(situation, cost, found, ended_at)


def figures(situation: Situation, cost: dict[str, Any], found: dict[str, int], ended_at: float) -> Figures:
    """Return what a process told, and the sink, as the measures of the table, and `arrived_part`."""
    is_chain = situation.form in FRAMEWORKS
    per_request = 1 if is_chain else STAGES_PER_REQUEST
    recorded = cost["requests"] * per_request
    # What the warm-up recorded was delivered before.
    warm_up = cost["warm_up"] * per_request
    arrived = recorded if is_chain else max(0, found["arrived"] - warm_up)
    result = {
        "caller_p50_us": cost["p50_us"] / per_request,
        "caller_p99_us": cost["p99_us"] / per_request,
        "slowest_ms": cost["slowest_us"] / 1000,
        "cpu_us": cost["cpu_s"] * 1e6 / (arrived or recorded),
        "peak_mib": cost["peak_bytes"] / (1 << 20),
        "queued_bytes": cost["grown_bytes"] / recorded,
        "exit_s": ended_at - cost["ended_at"],
    }
    if situation.server == "answers":
        result["arrived_part"] = found["arrived"] / (recorded + warm_up) if is_chain else arrived / recorded
        result["wire_bytes"] = found["wire_bytes"] / (arrived + warm_up)
    if situation.end == "flush":
        result["delivered_per_s"] = arrived / cost["elapsed_s"]
    return result


def start(subject: type[Subject]) -> Figures:
    """Return how long the import takes in a fresh process, and how many packages an installation has."""
    script = f"import time; a = time.perf_counter(); {subject.imports}; print(time.perf_counter() - a)"
    took_s = []
    with tempfile.TemporaryDirectory() as folder:
        # An installed package is compiled already; this one, run from its source, may not be, or not be kept.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(3):  # the quickest of them: files are compiled, in memory, and nothing came between
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
            )
            took_s.append(float(done.stdout))
    return {"import_ms": min(took_s) * 1000, "packages": len(_installation(subject.distributions))}


def _installation(distributions: tuple[str, ...]) -> set[str]:
    """Return the names of distributions and of all that they need."""
    found: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def measure(situation: Situation, rounds: int) -> dict[str, list[Figures]]:
    """Measure a situation, the SDKs in turns; return the figures of every round."""
    results: dict[str, list[Figures]] = {name: [] for name in situation.subjects}
    baseline: list[Figures] = []
    for number in range(rounds):
        names = situation.subjects if number % 2 == 0 else tuple(reversed(situation.subjects))
        for name in names:
            if situation.name == "start":
                results[name].append(start(SUBJECTS[name]))
            else:
                results[name].append(run(name, situation))
        if situation.name != "start":
            baseline.append(run("nothing", situation))
    for measured in ("caller_p50_us", "cpu_us"):  # the program's own work is not the SDK's
        if baseline:
            own = statistics.median(figures[measured] for figures in baseline)
            for rows in results.values():
                for row in rows:
                    if measured in row:
                        row[measured] -= own
    return results
