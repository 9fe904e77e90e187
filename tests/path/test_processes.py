"""Programs of several processes: each goes on recording, and nothing is sent twice or lost."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from tests.support import LiveServer, clean_environment, free_port

FORK = """
    import os, sys, time
    from evalvault_sdk import StageTracer
    tracer = StageTracer({run!r}, {url!r}, flush_interval_s={interval})

    def record(who, count):
        for number in range(count):
            with tracer.stage("work", attributes={{"who": who, "number": number}}):
                pass

    record("before", 700)
    {sleep}
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            stats = tracer.stats()
            assert stats.recorded == 0, "what waited is the parent's"
            record(f"child {{child}}", 500)
            report = tracer.shutdown(20)
            assert report.complete and report.recorded == 500, report
            sys.stdout.flush()
            os._exit(0)
        children.append(pid)
        record("parent", 100)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    record("after", 100)
    report = tracer.shutdown(20)
    assert report.complete and report.recorded == 700 + 300 + 100, report
"""

MULTIPROCESSING = """
    import multiprocessing, sys
    from evalvault_sdk import StageTracer

    def work(number, run, url):
        tracer = StageTracer(run, url, flush_interval_s=60) if shared is None else shared
        for step in range(300):
            with tracer.stage("work", attributes={{"number": number, "step": step}}):
                pass
        # The child just returns: neither flush nor shutdown.

    shared = None
    if __name__ == "__main__":
        method = {method!r}
        if method == "fork":
            shared = StageTracer({run!r}, {url!r}, flush_interval_s=60)
            shared.record_stage("parent")
        context = multiprocessing.get_context(method)
        processes = [context.Process(target=work, args=(number, {run!r}, {url!r})) for number in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0, process.exitcode
"""


def run_script(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", *arguments, script],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("waiting", ["all is still queued", "the thread is at work"])
def test_parent_and_forked_children_go_on_recording(server: LiveServer, waiting: str) -> None:
    run = f"run-{uuid.uuid4()}"
    interval, sleep = (60, "") if waiting == "all is still queued" else (0.01, "time.sleep(0.5)")
    script = textwrap.dedent(FORK.format(run=run, url=server.url, interval=interval, sleep=sleep))
    run_script(script, "-c")
    events = server.get(f"events/{run}", limit=10_000)["events"]
    counts: dict[str, int] = {}
    for event in events:
        counts[event["attributes"]["who"]] = counts.get(event["attributes"]["who"], 0) + 1
    assert counts == {"before": 700, "parent": 300, "after": 100, "child 0": 500, "child 1": 500, "child 2": 500}


def test_a_child_does_not_wait_for_locks_that_threads_of_its_parent_held(server: LiveServer) -> None:
    run = f"run-{uuid.uuid4()}"
    script = f"""
        import gc, os, threading
        from evalvault_sdk import StageTracer
        tracer = StageTracer({run!r}, {server.url!r}, flush_interval_s=60)
        tracer.record_stage("before")
        assert tracer.flush(20).complete
        manager = tracer._outbox.worker._courier.transport._poster._session.get_adapter({server.url!r}).poolmanager
        locks = [manager.pools.lock, *(manager.pools[key].pool.mutex for key in manager.pools.keys())]
        locks += [tracer._outbox.worker.ledger.lock, tracer._outbox.worker._starting]
        held, release = threading.Event(), threading.Event()

        def hold():
            for lock in locks:
                lock.acquire(timeout=1)
            held.set()
            release.wait()
            for lock in reversed(locks):
                lock.release()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if child == 0:
            gc.collect()
            tracer.record_stage("child")
            report = tracer.shutdown(10)
            assert report.complete and report.recorded == 1, report
        else:
            assert os.waitpid(child, 0)[1] == 0
            release.set()
            holder.join()
            tracer.record_stage("after")
            assert tracer.flush(20).complete
    """
    run_script(textwrap.dedent(script), "-c")
    assert server.get(f"summary/{run}")["stage_type_counts"] == {"before": 1, "child": 1, "after": 1}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_child_that_just_returns_loses_nothing(
    server: LiveServer, method: str, tmp_path: object
) -> None:
    run = f"run-{uuid.uuid4()}"
    path = f"{tmp_path}/program.py"
    with open(path, "w") as file:  # noqa: PTH123 - spawn imports the program again, by its path
        file.write(textwrap.dedent(MULTIPROCESSING.format(run=run, url=server.url, method=method)))
    run_script(path)
    assert server.get(f"summary/{run}")["stage_type_counts"]["work"] == 900


@pytest.mark.parametrize("durability", ["spool", "journal"])
def test_a_forked_child_leaves_what_its_parent_has_on_disk_to_its_parent(tmp_path: Path, durability: str) -> None:
    port = free_port()
    script = f"""
        import os, sys, time
        from evalvault_sdk import StageTracer
        tracer = StageTracer("forked", "http://127.0.0.1:{port}", durability={durability!r}, flush_interval_s=0.05)
        for number in range(10):
            tracer.record_stage("parent")
        while tracer.stats().spooled < 10:
            time.sleep(0.01)
        pid = os.fork()
        if pid == 0:
            for number in range(5):
                tracer.record_stage("child")
            report = tracer.shutdown(0.2)
            assert (report.recorded, report.spooled) == (5, 5), report
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print("forked", flush=True)
        sys.stdin.readline()
        report = tracer.shutdown(20)
        assert (report.recorded, report.delivered) == (10, 10), report
        assert report.recovered in (0, 5), report
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "forked\n"
    server = LiveServer(tmp_path / "x.db", port=port)
    try:
        _, said = process.communicate("\n", timeout=60)
        assert process.returncode == 0, said
        assert server.get("summary/forked")["stage_type_counts"]["parent"] == 10
    finally:
        server.stop()
