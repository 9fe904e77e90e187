"""
More events in an outage than memory holds: within the bounds of memory and disk, and afterwards quickly gone.

A quarter of a million here; `make soak` does it with a million.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.support import LiveServer, clean_environment, free_port

COUNT = int(os.environ.get("OUTAGE_EVENTS", "250000"))
LIVE = COUNT // 5

PROGRAM = """
    import json, sys, time
    from pathlib import Path
    from evalvault_sdk import StageTracer

    def memory(field):
        for line in open("/proc/self/status"):
            if line.startswith(field):
                return int(line.split()[1]) * 1024

    def record(count):
        for number in range(count):
            tracer.record_stage("work", attributes={{"query": "사망보험금은 언제 지급되나요?", "number": number}})

    interval_s = 1.0
    tracer = StageTracer("outage", {url!r}, flush_interval_s=interval_s, retry_max_s=1.0)
    record(1)
    tracer.flush(0.5)
    before = memory("VmRSS")
    record({count} - 1)
    answer = {{"memory": memory("VmHWM") - before}}
    stats = tracer.stats()
    assert stats.pending == {count}, stats
    folder = tracer._outbox.worker._spool.folder
    answer["disk"] = sum(path.stat().st_size for path in folder.iterdir())

    print("the outage may end", flush=True)
    sys.stdin.readline()
    while not tracer.stats().delivered:
        time.sleep(0.01)
    started, delivered, late = time.monotonic(), tracer.stats().delivered, []
    probe = StageTracer("live", {url!r}, flush_interval_s=interval_s, retry_max_s=1.0)
    assert probe._outbox.worker is tracer._outbox.worker
    while tracer.stats().delivered < {count}:
        recorded = time.monotonic()
        probe.record_stage("live")
        while probe.stats().pending:
            time.sleep(0.01)
        late.append(time.monotonic() - recorded)
    answer["drained_per_s"] = ({count} - delivered) / (time.monotonic() - started)
    answer["late"] = late
    answer["left"] = len(list(folder.glob("*-*-*.jsonl")))

    started = time.monotonic()
    record({live})
    assert tracer.flush(120).in_time
    answer["live_per_s"] = {live} / (time.monotonic() - started)
    report = tracer.shutdown()
    assert report.complete, report
    print(json.dumps(answer))
"""


@pytest.mark.timeout(400)
def test_events_of_a_long_outage_stay_within_bounds_and_drain_while_live_ones_arrive(tmp_path: Path) -> None:
    port = free_port()
    script = textwrap.dedent(PROGRAM).format(url=f"http://127.0.0.1:{port}", count=COUNT, live=LIVE)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server: LiveServer | None = None
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "the outage may end\n"
        server = LiveServer(tmp_path / "x.db", port=port)
        out, said = process.communicate("\n", timeout=300)
        assert process.returncode == 0, said
        answer: dict[str, Any] = json.loads(out)
        assert server.get("summary/outage")["total_events"] == COUNT + LIVE
    finally:
        process.kill()
        if server is not None:
            server.stop()
    print({key: value for key, value in answer.items() if key != "late"}, sorted(answer["late"])[-3:])
    mebibyte = 1 << 20
    assert answer["memory"] <= (64 + 50) * mebibyte
    assert answer["disk"] <= 512 * mebibyte
    assert answer["left"] == 0
    assert answer["drained_per_s"] >= answer["live_per_s"] / 2
    late = sorted(answer["late"])
    assert late[len(late) * 9 // 10] <= 2.0, "two flush intervals"
