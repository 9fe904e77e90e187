"""The whole trip: a tracer in this process, real HTTP, a server in another."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import timeit
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from evalvault_sdk import StageEvent, StageEventBuilder, StagePayloadRef, StageTracer
from tests.support import (
    ROOT,
    LiveServer,
    MemoryTransport,
    balances,
    clean_environment,
    free_port,
    live_server,
    new_threads,
    wait_for,
)


@pytest.fixture
def tracer(server: LiveServer) -> Iterator[StageTracer]:
    with StageTracer(run_id=f"run-{uuid.uuid4()}", api_url=server.url) as made:
        yield made


def stored(server: LiveServer, run_id: str, count: int = 200) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = server.get(f"events/{run_id}", limit=count)["events"]
    return events


def test_the_examples_of_the_plan_run_as_they_are_written_there(server: LiveServer) -> None:
    class Document:
        def __init__(self, id: str, score: float) -> None:
            self.id = id
            self.score = score

    class BaseCallbackHandler:
        """Stands in for LangChain's, which has no state of its own."""

    def retrieve(query: str) -> list[Document]:
        return [Document("d1", 0.9), Document("d2", 0.4)]

    query, parent_id = "보험 보장금액은?", "input-123"
    run_id = f"rag-001-{uuid.uuid4()}"

    tracer = StageTracer(run_id=run_id, api_url=server.url)

    # One event.
    tracer.record_stage(
        stage_type="query_rewrite", attributes={"original": "...", "rewritten": "..."}, duration_ms=45.2
    )

    # A context manager, timed by itself.
    with tracer.stage("retrieval", parent_stage_id=parent_id) as stage:
        results = retrieve(query)
        stage.attributes = {
            "doc_ids": [r.id for r in results],
            "scores": [r.score for r in results],
            "top_k": len(results),
        }

    # The plan's LangChain handler.
    class EvalVaultTracer(BaseCallbackHandler):
        def __init__(self, run_id: str) -> None:
            self.tracer = StageTracer(run_id=run_id, api_url=server.url)
            self.current_stage: Any = None

        def on_retriever_start(self, query: str, **kwargs: Any) -> None:
            self.current_stage = self.tracer.stage("retrieval")
            self.current_stage.__enter__()
            self.current_stage.attributes["query"] = query

        def on_retriever_end(self, documents: list[Document], **kwargs: Any) -> None:
            if self.current_stage:
                self.current_stage.attributes["doc_ids"] = [d.id for d in documents]
                self.current_stage.__exit__(None, None, None)

    handler = EvalVaultTracer(run_id)
    handler.on_retriever_start(query)
    handler.on_retriever_end(retrieve(query))

    assert tracer.shutdown(10).complete
    assert handler.tracer.shutdown(10).complete
    rewrite, first, second = sorted(
        stored(server, run_id), key=lambda event: (event["stage_type"], event["attributes"].get("query", ""))
    )
    assert rewrite["duration_ms"] == 45.2
    assert first["attributes"] == {"doc_ids": ["d1", "d2"], "scores": [0.9, 0.4], "top_k": 2}
    assert first["parent_stage_id"] == parent_id
    assert second["attributes"] == {"query": query, "doc_ids": ["d1", "d2"]}


def test_record_stage_carries_every_field(server: LiveServer, tracer: StageTracer) -> None:
    start = datetime(2026, 1, 7, 10, tzinfo=timezone.utc)
    stage_id = tracer.record_stage(
        "Output",
        stage_name="n",
        attributes={"answer": "1억원"},
        metadata={"model": "m"},
        duration_ms=5,
        started_at=start,
        finished_at="2026-01-07T10:00:01Z",
        status="error",
        attempt=2,
        stage_id="my-id",
        parent_stage_id="p",
        trace_id="t",
        span_id="s",
        input_ref=StagePayloadRef("s3", "i"),
        output_ref=StagePayloadRef("s3", "o"),
    )
    assert stage_id == "my-id"
    assert tracer.flush(10).complete
    (event,) = stored(server, tracer.run_id)
    assert StageEvent.from_dict(event) == StageEvent(
        run_id=tracer.run_id,
        stage_type="output",
        stage_name="n",
        attributes={"answer": "1억원"},
        metadata={"model": "m"},
        duration_ms=5,
        started_at=start,
        finished_at=datetime(2026, 1, 7, 10, 0, 1, tzinfo=timezone.utc),
        status="error",
        attempt=2,
        stage_id="my-id",
        parent_stage_id="p",
        trace_id="t",
        span_id="s",
        input_ref=StagePayloadRef("s3", "i"),
        output_ref=StagePayloadRef("s3", "o"),
    )


def test_record_stage_finds_its_parent_and_its_times(server: LiveServer, tracer: StageTracer) -> None:
    with tracer.stage("request") as request:
        child = tracer.record_stage("input", attributes={"query": "q"}, duration_ms=1000)
    assert tracer.flush(10).complete
    by_id = {event["stage_id"]: event for event in stored(server, tracer.run_id)}
    event = StageEvent.from_dict(by_id[child])
    assert (event.parent_stage_id, event.trace_id) == (request.stage_id, request.trace_id)
    assert event.started_at is not None
    assert event.finished_at is not None
    assert (event.finished_at - event.started_at).total_seconds() == pytest.approx(1, abs=0.001)


def test_record_batch_takes_events_objects_and_what_the_builder_made(
    server: LiveServer, tracer: StageTracer, caplog: pytest.LogCaptureFixture
) -> None:
    built = StageEventBuilder("rerank", run_id="another-run").reranked(10, 2).build()
    ids = tracer.record_batch(
        [
            StageEvent(run_id=tracer.run_id, stage_type="input", stage_id="a"),
            {"stage_type": "retrieval", "stage_id": "b", "trace": {"trace_id": "t"}},
            {"stage_type": "retrieval", "duration_ms": -1, "attributes": {"query": "my secret"}},
            None,  # type: ignore[list-item]
            built,
        ]
    )
    assert ids == ["a", "b", None, None, built.stage_id]
    stats = tracer.flush(10)
    assert (stats.delivered, dict(stats.dropped)) == (3, {"invalid": 2})
    assert balances(stats)
    assert "secret" not in caplog.text
    assert [event["stage_id"] for event in stored(server, tracer.run_id)] == ["a", "b"]
    assert stored(server, "another-run")[-1]["stage_id"] == built.stage_id


def test_what_the_server_rejects_is_counted_and_its_neighbours_are_stored(
    server: LiveServer, tracer: StageTracer, caplog: pytest.LogCaptureFixture
) -> None:
    tracer.record_stage("input")
    tracer.record_stage("", attributes={"query": "my secret"})
    tracer.record_stage("input", duration_ms=-5)
    with tracer.stage("output") as stage:
        stage.attempt = "second"  # type: ignore[assignment]
    stats = tracer.flush(10)
    assert (stats.delivered, stats.rejected, stats.complete) == (1, 3, False)
    assert balances(stats)
    wait_for(lambda: "stage_type is required" in caplog.text)
    assert "secret" not in caplog.text


def test_fifty_thousand_stages_of_threads_and_tasks_at_once_are_each_stored_once(tmp_path: Path) -> None:
    threads, per_thread, tasks, per_task = 8, 400, 100, 24
    expected: dict[str, str | None] = {}

    def remember(*stages: Any) -> None:
        expected.update({stage.stage_id: stage.parent_stage_id for stage in stages})

    with live_server(tmp_path / "many.db") as server:
        tracer = StageTracer(run_id="many", api_url=server.url)

        def in_a_thread(number: int) -> None:
            for step in range(per_thread):
                with tracer.stage("request", attributes={"thread": number, "step": step}) as request:
                    with tracer.stage("retrieval") as retrieval, tracer.stage("embed") as embed:
                        pass
                    with tracer.stage("rerank") as rerank:
                        recorded = tracer.record_stage("note")
                    with tracer.stage("output") as output:
                        pass
                assert retrieval.parent_stage_id == rerank.parent_stage_id == output.parent_stage_id == request.stage_id
                assert embed.parent_stage_id == retrieval.stage_id
                remember(request, retrieval, embed, rerank, output)
                expected[recorded] = rerank.stage_id

        async def in_a_task(number: int) -> None:
            for step in range(per_task):
                async with tracer.stage("request", attributes={"task": number, "step": step}) as request:
                    await asyncio.sleep(0)
                    async with tracer.stage("retrieval") as retrieval:
                        await asyncio.sleep(0)

                    async def rerank(parent: str | None = request.stage_id) -> None:
                        async with tracer.stage("rerank") as stage:
                            await asyncio.sleep(0)
                            assert stage.parent_stage_id == parent
                        remember(stage)

                    await asyncio.gather(*(rerank() for _ in range(11)))
                assert retrieval.parent_stage_id == request.stage_id
                remember(request, retrieval)

        async def all_tasks() -> None:
            await asyncio.gather(*(in_a_task(number) for number in range(tasks)))

        with ThreadPoolExecutor(threads + 1) as pool:
            futures = [pool.submit(in_a_thread, number) for number in range(threads)]
            futures.append(pool.submit(lambda: asyncio.run(all_tasks())))
            for future in futures:
                future.result()

        stats = tracer.shutdown(60)
        total = threads * per_thread * 6 + tasks * per_task * 13
        assert total >= 50_000
        assert len(expected) == total
        assert stats.complete, str(stats)
        assert stats.recorded == total

        server.stop()
        with sqlite3.connect(server.db) as db:
            rows = db.execute("SELECT stage_id, parent_stage_id, run_id FROM stage_events").fetchall()
        db.close()
        assert len(rows) == total
        assert {stage_id: parent for stage_id, parent, _ in rows} == expected
        assert {run_id for _, _, run_id in rows} == {"many"}


def test_a_dead_server_a_full_queue_and_broken_objects_are_not_felt(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError("my secret")

        def __repr__(self) -> str:
            raise RuntimeError("my secret")

    tracer = StageTracer(
        "r",
        f"http://127.0.0.1:{free_port()}",
        durability="memory",
        max_queue_events=50,
        retry_initial_s=0.01,
        retry_max_s=0.02,
    )

    @tracer.stage("work")
    def work() -> int:
        return 7

    slowest = 0.0
    for _ in range(200):
        started = time.perf_counter()
        with tracer.stage("retrieval") as stage:
            stage.attributes = {"broken": Broken(), Broken: {"x": Broken()}}  # type: ignore[dict-item]
        stage.metadata = Broken()  # type: ignore[assignment]
        tracer.record_stage(Broken(), attributes=Broken(), duration_ms=Broken())  # type: ignore[arg-type]
        tracer.record_batch(Broken())
        assert work() == 7
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 1
    assert not tracer.flush(0.2).complete
    started = time.monotonic()
    stats = tracer.shutdown(0.5)
    assert time.monotonic() - started < 2
    assert balances(stats)
    assert stats.delivered == 0
    assert stats.dropped["queue_full"] > 0
    assert stats.pending == 0
    assert "secret" not in caplog.text


def test_a_server_that_is_killed_under_load_and_comes_back_gets_everything_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    recorded: list[str] = []
    stop = threading.Event()
    tracer = StageTracer(
        "killed", f"http://127.0.0.1:{port}", flush_interval_s=0.05, retry_initial_s=0.05, retry_max_s=0.2
    )

    def record() -> None:
        while not stop.wait(0.002):
            recorded.append(tracer.record_stage("work", attributes={"text": "보험" * 50}))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        server = LiveServer(tmp_path / "x.db", port=port)
        time.sleep(0.7)
        server.stop(signal.SIGKILL)
        time.sleep(0.3)
    with_the_last_server = LiveServer(tmp_path / "x.db", port=port)
    stop.set()
    for thread in threads:
        thread.join()
    report = tracer.shutdown(30)
    with_the_last_server.stop()
    assert report.complete, str(report)
    with sqlite3.connect(tmp_path / "x.db") as db:
        stored_ids = [stage_id for (stage_id,) in db.execute("SELECT stage_id FROM stage_events")]
    db.close()
    assert len(recorded) > 1000
    assert sorted(stored_ids) == sorted(recorded)
    lines = [record.getMessage() for record in caplog.records]
    began = [line for line in lines if "cannot deliver" in line]
    ended = [line for line in lines if "again after" in line]
    assert len(lines) == len(began) + len(ended) <= 8, "a line when an outage begins, one when it ends, none between"


def test_a_disabled_tracer_has_no_thread_no_network_and_no_events() -> None:
    before = set(threading.enumerate())
    with StageTracer("r", "http://127.0.0.1:1", enabled=False) as tracer:
        with tracer.stage("a") as stage:
            stage.set(x=1)
        tracer.record_stage("b")
        tracer.record_batch([{"stage_type": "c"}])
        assert tracer.flush(5).recorded == 0
    assert new_threads(before) == 0


def test_a_disabled_tracer_costs_next_to_nothing_and_keeps_nothing() -> None:
    tracer = StageTracer("r", enabled=False)

    def function() -> int:
        return 1

    assert tracer.stage("a")(function) is function
    assert tracer.stage(function) is function
    with tracer.stage("a", attributes={"x": 1}) as stage, tracer.trace(session_id="s") as trace:
        stage.set(x=1)
        stage.attributes = {"y": 2}
        stage.attributes["z"] = 3
        stage.metadata["z"] = 3
        stage.stage_name, stage.status, stage.attempt = "n", "error", 2
        stage.fail("no")
        stage.skip()
        stage.save_input("x")
        with StageTracer("other", transport=MemoryTransport()).stage("child", parent=stage) as child:
            assert child.parent_stage_id is None
    assert stage.attributes == stage.metadata == {}
    assert stage.stage_name is None
    assert stage.attempt == 1
    assert tracer.stage("b") is stage
    assert trace.trace_id
    assert tracer.record_stage("c", stage_id="given") == "given"
    assert tracer.stats().recorded == 0

    def seconds(of: StageTracer) -> float:
        def run() -> None:
            with of.stage("retrieval") as stage:
                stage.set(doc_ids=["d1", "d2"], scores=[0.9, 0.8], top_k=2)

        return min(timeit.repeat(run, number=2000, repeat=5))

    enabled = StageTracer("r", transport=MemoryTransport())
    assert seconds(tracer) < seconds(enabled) / 5  # of its own 1/8: this machine may be busy
    enabled.shutdown()


def test_a_tracer_that_is_forgotten_delivers_and_ends_its_thread(server: LiveServer) -> None:
    run_id = f"run-{uuid.uuid4()}"
    before = set(threading.enumerate())
    StageTracer(run_id, server.url).record_stage("input")
    (worker,) = set(threading.enumerate()) - before
    worker.join(10)
    assert not worker.is_alive()
    assert len(stored(server, run_id)) == 1


def test_what_a_forgotten_tracer_made_goes_on_recording(server: LiveServer) -> None:
    run_id = f"run-{uuid.uuid4()}"

    def make() -> Any:
        tracer = StageTracer(run_id, server.url)
        return tracer.stage("decorated")(lambda: 7)

    decorated = make()
    gc.collect()
    before = set(threading.enumerate())
    assert decorated() == 7
    with StageTracer(run_id, server.url).stage("block"):
        pass
    workers = set(threading.enumerate()) - before
    del decorated
    gc.collect()
    for worker in workers:
        worker.join(10)
    assert sorted(event["stage_type"] for event in stored(server, run_id)) == ["block", "decorated"]


ENDINGS = {
    "returns": "",
    "sys.exit": "sys.exit(0)",
    "an exception": "raise RuntimeError('on purpose')",
    "a daemon thread": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "records in atexit": "atexit.register(lambda: [tracer.record_stage('late') for _ in range(5)])",
    "records and flushes only in atexit": (
        "late = StageTracer(tracer.run_id, tracer.settings.api_url)\n"
        "atexit.register(lambda: [late.record_stage('late') for _ in range(5)] and late.flush(30).complete or 1 / 0)"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", [1, 2000])
def test_nothing_is_lost_when_a_program_ends_without_flush(server: LiveServer, ending: str, count: int) -> None:
    run_id = f"run-{uuid.uuid4()}"
    script = textwrap.dedent(
        f"""
        import atexit, sys, threading, time
        from evalvault_sdk import StageTracer
        tracer = StageTracer({run_id!r}, {server.url!r})
        for _ in range({count}):
            with tracer.stage("input"):
                pass
        """
    )
    script += ENDINGS[ending]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
    assert time.monotonic() - started < 10
    assert done.returncode == (1 if ending == "an exception" else 0)
    late = 5 if "in atexit" in ending else 0
    assert server.get(f"events/{run_id}")["total"] == count + late, done.stderr.decode()


def test_a_program_ends_in_time_although_there_is_no_server() -> None:
    script = textwrap.dedent(
        f"""
        import time
        from evalvault_sdk import StageTracer
        short = {{"shutdown_timeout_s": 0.5, "durability": "memory"}}
        tracers = [
            StageTracer("r", "http://127.0.0.1:{free_port()}", **short, headers={{"n": str(n)}})
            for n in range(5)
        ]
        for tracer in tracers:
            tracer.record_stage("input")
        print(time.time())
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
    assert time.time() - float(done.stdout) < 2.4, "five workers share one deadline of 0.5 s"
    assert done.stderr.decode().count("were lost (shutdown)") == 5


def test_a_program_whose_only_events_come_at_its_very_end_ends_in_time_although_the_server_hangs() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        script = textwrap.dedent(
            f"""
            import atexit, time
            from evalvault_sdk import StageTracer
            tracer = StageTracer("r", "http://127.0.0.1:{silent.getsockname()[1]}", shutdown_timeout_s=0.5)
            atexit.register(lambda: (tracer.record_stage("late"), tracer.flush(0.5)))
            print(time.time())
            """
        )
        done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
        assert time.time() - float(done.stdout) < 3
        assert "1 events for" in done.stderr.decode()
        assert "are kept in" in done.stderr.decode()


def test_the_real_program_is_traced_as_a_tree(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "rag_tracing" / "custom_rag_example.py")],
            env={**clean_environment(), "EVALVAULT_API_URL": server.url, "EVALVAULT_RUN_ID": "example"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        summary = server.get("summary/example", detail=True)
        counts = summary["stage_type_counts"]
        assert counts["request"] >= 100
        assert summary["missing_required_stage_types"] == []
        assert summary["stage_types"]["language_detection"]["errors"] == 3
        assert counts["rerank"] == counts["retrieval"] - 3, "three retrievals find nothing"
        assert f"recorded {summary['total_events']:,} = delivered {summary['total_events']:,}" in done.stdout

        events = server.get("events/example", limit=10_000)["events"]
        roots = {event["stage_id"]: event for event in events if event["stage_type"] == "request"}
        assert all(root["parent_stage_id"] is None for root in roots.values())
        for event in events:
            if event["stage_id"] not in roots:
                assert event["trace_id"] == roots[event["parent_stage_id"]]["trace_id"]
        korean = [e for e in events if e["stage_type"] == "input" and "임시 파일" in e["attributes"]["query"]]
        assert len(korean) == 1


class Model(BaseHTTPRequestHandler):
    """A model with OpenAI's API, which fails the first time."""

    asked: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = {
            "choices": [{"message": {"content": "Use it [json.loads]."}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 5},
        }
        body = json.dumps(answer).encode()
        self.send_response(500 if len(self.asked) == 1 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_real_program_asks_a_model_that_it_is_pointed_at(server: LiveServer) -> None:
    run_id = f"run-{uuid.uuid4()}"
    model = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=model.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "rag_tracing" / "custom_rag_example.py")],
            env={
                **clean_environment(),
                "EVALVAULT_API_URL": server.url,
                "EVALVAULT_RUN_ID": run_id,
                "LLM_API_URL": f"http://127.0.0.1:{model.server_port}/v1",
                "LLM_MODEL": "local-7b",
            },
            capture_output=True,
            text=True,
            timeout=100,
        )
    finally:
        model.shutdown()
        thread.join()
        model.server_close()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "[json.encoder.JSONEncoder]" in Model.asked[0]["messages"][1]["content"], "the passages that were found"
    failed, answered, *_ = (event for event in stored(server, run_id) if event["stage_type"] == "output")
    assert (failed["status"], failed["attributes"]["error"]["type"]) == ("error", "requests.exceptions.HTTPError")
    assert answered["attributes"]["model"] == "local-7b"
    assert answered["attributes"]["tokens_in"] == 300
    assert answered["attributes"]["finish_reason"] == "stop"
