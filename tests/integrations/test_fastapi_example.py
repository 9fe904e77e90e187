"""The FastAPI service among the examples, as a process beside a real server: asked, left, and ended."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from evalvault_sdk import StageTracer, trace_headers
from tests.support import ROOT, LiveServer, clean_environment, free_port, wait_for

QUESTION = {"question": "How do I copy a directory tree recursively?"}


class Service:
    """The example under uvicorn."""

    def __init__(self, server: LiveServer, log: Path, **environ: str) -> None:
        self.run_id = f"service-{uuid.uuid4()}"
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = log
        self._server = server
        self._output = log.open("wb")
        folder = str(ROOT / "examples" / "rag_tracing")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--app-dir", folder, "--port", str(port), "fastapi_service_example:app"],
            env={**clean_environment(), "EVALVAULT_API_URL": server.url, "EVALVAULT_RUN_ID": self.run_id, **environ},
            stdout=self._output,
            stderr=self._output,
        )
        wait_for(self._is_ready, 30)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/ready", timeout=5).json()["ready"] is True
        return False

    def ask(self, path: str = "/ask", *, status: int = 200, **options: Any) -> requests.Response:
        response = requests.post(self.url + path, json=QUESTION, timeout=30, **options)
        assert response.status_code == status
        return response

    def end(self) -> str:
        """Send SIGTERM; return what the process said of its stages."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            finally:
                self._process.kill()
                self._process.wait()
                self._output.close()
        return self.log.read_text()

    def trees(self) -> list[dict[str, Any]]:
        """Return the traces that the server has, the oldest first: each a stage with what is below it."""
        events = {event["stage_id"]: event for event in self._server.get(f"events/{self.run_id}")["events"]}
        for event in events.values():
            event["below"] = [other for other in events.values() if other["parent_stage_id"] == event["stage_id"]]
            event["below"].sort(key=lambda other: other["started_at"] or other["finished_at"])
        roots = [event for event in events.values() if event["parent_stage_id"] not in events]
        return sorted(roots, key=lambda root: root["started_at"])


def outline(stage: dict[str, Any]) -> list[str]:
    return [stage["stage_type"], *(name for below in stage["below"] for name in outline(below))]


def test_the_service_is_asked_both_ways_and_sigterm_loses_nothing(server: LiveServer, tmp_path: Path) -> None:
    service = Service(server, tmp_path / "service.log")
    try:
        answer = service.ask(headers={"X-Session-Id": "s-1"}).json()
        assert "shutil.copytree" in answer["passages"]
        assert "[shutil.copytree]" in answer["answer"]
        assert service.ask("/ask/stream").text == answer["answer"]
        with StageTracer(service.run_id, server.url) as caller, caller.stage("caller") as stage:
            service.ask(headers=trace_headers())
        assert requests.get(f"{service.url}/health", timeout=5).json() == {"status": "ok"}
        assert requests.post(f"{service.url}/ask", json={}, timeout=5).status_code == 422
    finally:
        said = service.end()
    assert "recorded 16 = delivered 16" in said
    once, stream, called, refused = service.trees()
    expected = ["request", "system_prompt", "input", "retrieval", "output"]
    assert [outline(root) for root in (once, stream, called, refused)] == [
        expected,
        expected,
        ["caller", *expected],
        ["request"],
    ]
    assert called["stage_id"] == stage.stage_id
    assert len({event["trace_id"] for event in (called, *called["below"][0]["below"])}) == 1
    assert (once["attributes"]["route"], once["attributes"]["status_code"]) == ("/ask", 200)
    assert (stream["attributes"]["route"], refused["attributes"]["status_code"]) == ("/ask/stream", 422)
    assert {event["metadata"].get("session_id") for event in (once, *once["below"])} == {"s-1"}
    retrieval, output = once["below"][2:]
    assert retrieval["attributes"]["doc_ids"] == answer["passages"]
    assert retrieval["attributes"]["query"] == QUESTION["question"]
    assert output["attributes"]["answer"] == answer["answer"]
    assert output["attributes"]["tokens_out"] == output["attributes"]["item_count"] == len(answer["answer"].split())
    assert server.get(f"summary/{service.run_id}")["missing_required_stage_types"] == []


class Model(BaseHTTPRequestHandler):
    """A model with OpenAI's API, which talks on until its server `is_done`, or nobody listens."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], asked))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while True:
                self._say({"choices": [{"delta": {"content": "word "}}]})
                if self.server.is_done.wait(0.01):  # type: ignore[attr-defined]
                    break
            self._say({"choices": [], "usage": {"prompt_tokens": 90, "completion_tokens": 7}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.was_left.set()  # type: ignore[attr-defined]

    def _say(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def model() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.asked, server.is_done, server.was_left = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.is_done.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_client_that_goes_away_ends_the_stream_down_to_the_model(
    server: LiveServer, tmp_path: Path, model: Any
) -> None:
    address = f"http://127.0.0.1:{model.server_port}/v1"
    service = Service(server, tmp_path / "service.log", LLM_API_URL=address, LLM_MODEL="m", LLM_API_KEY="k")
    try:
        with service.ask("/ask/stream", stream=True) as response:
            assert next(response.iter_content(5)) == b"word "
        assert model.was_left.wait(10)
        model.is_done.set()
        assert service.ask().json()["answer"] == "word "
        model.shutdown()
        model.server_close()
        service.ask(status=502)
    finally:
        said = service.end()
    assert "recorded 15 = delivered 15" in said
    path, key, asked = model.asked[0]
    assert (path, key, asked["model"]) == ("/v1/chat/completions", "Bearer k", "m")
    assert "[shutil.copytree]" in asked["messages"][1]["content"]
    left, answered, failed = service.trees()
    assert (left["status"], left["below"][-1]["status"]) == ("cancelled", "cancelled")
    assert left["attributes"]["cancelled_by"] == "client_disconnect"
    output = answered["below"][-1]
    assert (output["attributes"]["tokens_in"], output["attributes"]["tokens_out"]) == (90, 7)
    assert output["attributes"]["model"] == "m"
    assert (failed["status"], failed["attributes"]["status_code"]) == ("error", 502)
    assert failed["below"][-1]["attributes"]["error"]["type"].endswith("ConnectionError")


def test_a_request_that_is_being_answered_when_sigterm_comes_is_finished_and_delivered(
    server: LiveServer, tmp_path: Path, model: Any
) -> None:
    service = Service(server, tmp_path / "service.log", LLM_API_URL=f"http://127.0.0.1:{model.server_port}/v1")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(service.ask("/ask/stream").text))
    asking.start()
    wait_for(lambda: bool(model.asked))
    ending = threading.Thread(target=service.end)
    ending.start()
    wait_for(lambda: "Shutting down" in service.log.read_text())
    model.is_done.set()
    for thread in (asking, ending):
        thread.join(20)
    assert answers[0].startswith("word ")
    assert "recorded 5 = delivered 5" in service.log.read_text()
    (root,) = service.trees()
    assert [root["status"], *(stage["status"] for stage in root["below"])] == ["success"] * 5
