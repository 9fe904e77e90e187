"""
One SDK in one situation, once, in a process of its own; what it cost as one line of JSON.

In:   the SDK's name, the situation's, the server's port.
Out:  microseconds of a request on the caller's side; CPU seconds of the whole process and seconds until all was
      delivered; bytes of memory. And the time at which the program ended, for who measures how long the exit took.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.situations import SITUATIONS, Situation
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.workload import ROOT_TYPE, STAGE_TYPES, Attributes, attributes_of

#: Requests that are not measured: imports, caches, the first connection.
WARM_UP = 40
_TASKS = 16
#: After which an SDK has done in the background what it does with events that it cannot deliver yet.
_SETTLE_S = 1.5
#: Requests after which the attributes come again.
_DIFFERENT = 2000
Request = Callable[[], object]


def blocks(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return a request in with-blocks."""
    root, span, fill = subject.root, subject.span, subject.fill

    def request() -> None:
        with root(ROOT_TYPE) as around:
            fill(around, next(attributes))
            for stage_type in STAGE_TYPES:
                with span(stage_type) as stage:
                    fill(stage, next(attributes))

    return request


def decorators(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return a request in decorated functions."""
    decorate, fill_current = subject.decorate, subject.fill_current
    assert decorate is not None
    assert fill_current is not None
    parts = [decorate(stage_type)(lambda: fill_current(next(attributes))) for stage_type in STAGE_TYPES]

    def request() -> None:
        fill_current(next(attributes))
        for function in parts:
            function()

    return decorate(ROOT_TYPE)(request)


def records(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return a request of stages that were measured elsewhere."""
    record = subject.record
    assert record is not None

    def request() -> None:
        parent = record(ROOT_TYPE, next(attributes), None)
        for stage_type in STAGE_TYPES:
            record(stage_type, next(attributes), parent)

    return request


def tasks(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return 16 requests in with-blocks, in tasks that take turns after every stage."""
    root, span, fill = subject.root, subject.span, subject.fill

    async def request() -> None:
        with root(ROOT_TYPE) as around:
            fill(around, next(attributes))
            for stage_type in STAGE_TYPES:
                with span(stage_type) as stage:
                    fill(stage, next(attributes))
                    await asyncio.sleep(0)

    async def together() -> None:
        await asyncio.gather(*(request() for _ in range(_TASKS)))

    return lambda: asyncio.run(together())


def langchain(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return a call of a chain of LangChain, with the SDK's handler."""
    from benchmarks.langchain_request import langchain_request

    return langchain_request(subject, attributes)


def llama_index(subject: Subject, attributes: Iterator[Attributes]) -> Request:
    """Return a query of LlamaIndex that the SDK records."""
    from benchmarks.llama_index_request import llama_index_request

    return llama_index_request(subject, attributes)


FORMS: dict[str, Callable[[Subject, Iterator[Attributes]], Request]] = {
    form.__name__: form for form in (blocks, decorators, records, tasks, langchain, llama_index)
}


def memory_bytes(which: str) -> int:
    """Return the resident memory of this process: `VmRSS` now, `VmHWM` at its peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux: the peak for both
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split(f"{which}:")[1].split()[0]) * 1024


def timed(request: Request, count: int, took: list[int]) -> None:
    """Do requests, and note how long each took."""
    for _ in range(count):
        started = time.perf_counter_ns()
        request()
        took.append(time.perf_counter_ns() - started)


def measure(subject: Subject, situation: Situation) -> dict[str, Any]:
    """Record, and return what it cost."""
    request = FORMS[situation.form](
        subject, itertools.cycle(attributes_of(min(situation.requests, _DIFFERENT), situation.text_bytes))
    )
    at_once = _TASKS if situation.form == "tasks" else 1
    for _ in range(WARM_UP // at_once):
        request()
    if situation.server == "answers":
        subject.flush()
    elif situation.server == "stalls":
        time.sleep(_SETTLE_S)
    gc.collect()
    memory, cpu, started = memory_bytes("VmRSS"), time.process_time(), time.monotonic()
    took: list[list[int]] = [[] for _ in range(situation.threads)]
    share = situation.requests // situation.threads // at_once
    if situation.threads == 1:
        timed(request, share, took[0])
    else:
        threads = [threading.Thread(target=timed, args=(request, share, mine)) for mine in took]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if situation.server == "stalls":
        time.sleep(_SETTLE_S)
        gc.collect()
    grown = memory_bytes("VmRSS") - memory
    if situation.end == "flush":
        subject.flush()
    request_us = sorted(nanoseconds / 1000 / at_once for mine in took for nanoseconds in mine)
    return {
        "p50_us": request_us[len(request_us) // 2],
        "p99_us": request_us[len(request_us) * 99 // 100],
        "slowest_us": request_us[-1],
        "requests": share * situation.threads * at_once,
        "warm_up": WARM_UP // at_once * at_once,
        "cpu_s": time.process_time() - cpu,
        "elapsed_s": time.monotonic() - started,
        "grown_bytes": grown,
        "peak_bytes": memory_bytes("VmHWM"),
    }


def main() -> None:
    """Run, print, and end as the situation wants."""
    name, situation, port = sys.argv[1], SITUATIONS[sys.argv[2]], int(sys.argv[3])
    cost = measure(SUBJECTS[name](port), situation)
    print(json.dumps({**cost, "ended_at": time.monotonic()}), flush=True)
    if situation.end != "leave":
        signal.raise_signal(signal.SIGKILL)  # not os._exit(): an SDK that flushes there takes its time


if __name__ == "__main__":
    main()
