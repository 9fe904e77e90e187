"""
The least that could do it: a deque, a thread, orjson, gzip and requests. What there is to win at most in Python.

In:   blocks with attributes, in one thread.
Out:  the same JSON as the SDK's, to the same sink.

It has no bounds, retries, spool, snapshots, limits, secrets, sampling, forks, threads or tasks to think of: whatever
happens besides, it loses events or ends the program.
"""

from __future__ import annotations

import collections
import datetime as dt
import gzip
import random
import threading
import time

import orjson
import requests

from benchmarks.workload import Attributes

_MAX_BATCH = 8192
_PAUSE_S = 0.005


class Sender:
    """A deque, and the thread that empties it."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/stage/events"
        self.waiting: collections.deque[tuple[int, int, Block]] = collections.deque()
        #: The blocks that the program is in.
        self.around: list[Block] = []
        self._wanted = False
        self._flushed = threading.Event()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Wait until all is sent."""
        self._flushed.clear()
        self._wanted = True
        self._flushed.wait()

    def close(self) -> None:
        """End the thread."""
        self._is_open = False
        self._thread.join()

    def _run(self) -> None:
        with requests.Session() as session:
            while self._is_open:
                self._step(session)

    def _step(self, session: requests.Session) -> None:
        waiting = self.waiting
        wanted, count = self._wanted, min(len(waiting), _MAX_BATCH)
        if count == _MAX_BATCH or (count and wanted):
            body = orjson.dumps({"events": [_event(*waiting.popleft()) for _ in range(count)]})
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            session.post(self._url, gzip.compress(body, 1), headers=headers, timeout=60).raise_for_status()
        elif wanted:
            self._wanted = False
            self._flushed.set()
        else:
            time.sleep(_PAUSE_S)


class Block:
    """What the program's with-block is."""

    __slots__ = ("_sender", "_started_ns", "_started_perf_ns", "attributes", "number", "parent", "stage_type")

    def __init__(self, stage_type: str, sender: Sender) -> None:
        self.stage_type = stage_type
        self.attributes: Attributes = {}
        self._sender = sender

    def __enter__(self) -> Block:
        around = self._sender.around
        self.number = random.getrandbits(128)
        self.parent = around[-1] if around else None
        around.append(self)
        self._started_ns = time.time_ns()
        self._started_perf_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed_ns = time.perf_counter_ns() - self._started_perf_ns
        self._sender.around.pop()
        self._sender.waiting.append((self._started_ns, elapsed_ns, self))


def _event(started_ns: int, elapsed_ns: int, block: Block) -> dict[str, object]:
    root = block
    while root.parent is not None:
        root = root.parent
    started = dt.datetime.fromtimestamp(started_ns / 1e9, dt.timezone.utc)
    return {
        "run_id": "bench",
        "trace_id": f"{root.number:032x}",
        "parent_stage_id": block.parent and _uuid(block.parent.number),
        "stage_id": _uuid(block.number),
        "span_id": f"{block.number:032x}"[16:],
        "started_at": started,
        "finished_at": started + dt.timedelta(microseconds=elapsed_ns // 1000),
        "duration_ms": elapsed_ns / 1e6,
        "stage_type": block.stage_type,
        "status": "success",
        "attributes": block.attributes,
    }


def _uuid(number: int) -> str:
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
