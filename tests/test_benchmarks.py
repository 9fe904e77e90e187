"""What the benchmark says of itself: the size of its stages, what its sink counts, what its ratios mean."""

from __future__ import annotations

import gzip
import itertools
import json
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sink
from benchmarks.recording import Figures, figures
from benchmarks.report import ratios_of, show, times_better
from benchmarks.run import FORMS
from benchmarks.situations import MEASURES, PEERS, SITUATIONS
from benchmarks.subjects import SUBJECTS, EvalVault, Nothing, OpenTelemetry, Prototype
from benchmarks.workload import STAGE_TYPES, STAGES_PER_REQUEST, attributes_of
from tests.markdown import section

ROOT = Path(__file__).parents[1]


@pytest.fixture
def server() -> Iterator[int]:
    """Serve the sink in a thread."""
    sink.requests.clear()

    class Joining(ThreadingHTTPServer):
        daemon_threads = False

    with Joining(("127.0.0.1", 0), sink.Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def test_a_stage_is_about_450_bytes_in_five_stages_a_request(server: int) -> None:
    subject = EvalVault(server)
    request = FORMS["blocks"](subject, itertools.cycle(attributes_of(20)))
    for _ in range(20):
        request()
    subject.flush()
    subject._tracer.shutdown()
    events = [
        event for _, headers, body in sink.requests for event in json.loads(sink.unpacked(headers, body))["events"]
    ]
    sizes = [len(json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()) for event in events]
    assert len(events) == 20 * STAGES_PER_REQUEST
    assert 430 <= sum(sizes) / len(sizes) <= 480
    assert [event["stage_type"] for event in events[:5]] == [*STAGE_TYPES, "request"]
    assert len({json.dumps(event["attributes"]) for event in events}) == len(events)


def test_the_prototype_sends_what_we_send(server: int) -> None:
    ours, prototype = EvalVault(server), Prototype(server)
    sent: list[list[dict[str, Any]]] = []
    for subject in (ours, prototype):
        FORMS["blocks"](subject, itertools.cycle(attributes_of(1)))()
        subject.flush()
        ((_, headers, body),) = sink.requests
        sent.append(json.loads(sink.unpacked(headers, body))["events"])
        sink.requests.clear()
    ours._tracer.shutdown()
    prototype._sender.close()
    known = ("stage_type", "status", "attributes", "run_id")
    assert [[event[name] for name in known] for event in sent[0]] == [
        [event[name] for name in known] for event in sent[1]
    ]
    for event, theirs in zip(*sent, strict=True):
        filled = {name: value for name, value in theirs.items() if value is not None}
        assert {name: len(str(event[name])) for name in event if name.endswith("id")} == {
            name: len(str(filled[name])) for name in event if name.endswith("id")
        }
        assert set(event) == set(filled)


@pytest.mark.parametrize("form", ["blocks", "decorators", "records", "tasks"])
def test_the_sink_counts_every_stage_in_every_form(server: int, form: str) -> None:
    ours, theirs = EvalVault(server), OpenTelemetry(server)
    for subject in (ours, theirs):
        FORMS[form](subject, itertools.cycle(attributes_of(16)))()
        subject.flush()
        found = sink.count()
        assert found["arrived"] == STAGES_PER_REQUEST * (16 if form == "tasks" else 1)
        assert found["wire_bytes"] > 0
        assert sink.count() == {"arrived": 0, "wire_bytes": 0, "bodies": 0}
    ours._tracer.shutdown()
    theirs._provider.shutdown()


def test_the_sink_counts_what_the_other_sdks_send() -> None:
    run = '{"id":"x","end_time":"2026-01-07T10:00:00Z"}'
    begun = '{"id":"x","end_time":null}'
    ids = ["0196b1b0-0000-7000-8000-000000000001", "0196b1b0-0000-7000-8000-000000000002"]

    def part(name: str, content: str) -> str:
        head = f'Content-Disposition: form-data; name="{name}"\r\nContent-Type: application/json\r\n'
        return f"--b\r\n{head}\r\n{content}\r\n"

    langsmith = part(f"post.{ids[0]}", run) + part(f"post.{ids[0]}.inputs", "{}") + part(f"post.{ids[1]}", begun)
    sentry = '{"sent_at":"now"}\n{"type":"transaction"}\n{"type":"transaction","spans":[{},{}]}\n'
    packed = Message()
    packed["Content-Encoding"] = "gzip"
    sink.requests[:] = [
        ("/runs/multipart", Message(), langsmith.encode()),
        ("/api/1/envelope/", packed, gzip.compress(sentry.encode())),
        ("/batch/", Message(), b'{"batch":[{},{},{}]}'),
    ]
    assert sink.count()["arrived"] == 1 + 3 + 3


def test_a_ratio_is_taken_within_a_round_and_above_one_when_we_are_better() -> None:
    ours = [{"cpu_us": 1.0, "delivered_per_s": 10.0}, {"cpu_us": 10.0, "delivered_per_s": 1.0}]
    theirs = [{"cpu_us": 4.0, "delivered_per_s": 5.0}, {"cpu_us": 40.0, "delivered_per_s": 0.5}]
    assert times_better("cpu_us", ours, theirs) == (4.0, 4.0, 4.0)
    assert times_better("delivered_per_s", ours, theirs) == (2.0, 2.0, 2.0)
    assert times_better("exit_s", ours, theirs) is None


def test_what_did_not_arrive_is_told() -> None:
    cost = {"requests": 8, "warm_up": 2, "cpu_s": 1.0, "elapsed_s": 2.0, "grown_bytes": 0, "peak_bytes": 1 << 20}
    cost |= {"p50_us": 50.0, "p99_us": 100.0, "slowest_us": 1000.0, "ended_at": 1.0}
    found = {"arrived": 30, "wire_bytes": 3000, "bodies": 1}  # ten of them of the warm-up
    told = figures(SITUATIONS["healthy"], cost, found, 1.5)
    assert told["arrived_part"] == 0.5
    assert told["cpu_us"] == 1e6 / 20
    assert told["delivered_per_s"] == 10
    assert told["caller_p50_us"] == 10
    assert told["wire_bytes"] == 100


@pytest.mark.parametrize("name", SITUATIONS)
def test_every_situation_names_what_there_is(name: str) -> None:
    situation = SITUATIONS[name]
    assert situation.form in FORMS
    assert set(situation.measures) <= set(MEASURES)
    assert set(situation.subjects) <= set(SUBJECTS)
    assert Nothing.name in SUBJECTS


def test_a_table_tells_what_failed_and_what_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    row = dict.fromkeys(SITUATIONS["healthy"].measures, 2.0) | {"arrived_part": 1.0}
    lost = dict.fromkeys(SITUATIONS["healthy"].measures, 6.0) | {"arrived_part": 0.9999}
    results: dict[str, dict[str, list[Figures]]] = {
        "healthy": {"evalvault-sdk": [row, row], "langfuse": [lost, row], "posthog": [{}, {}]}
    }
    show("healthy", results["healthy"])
    table = capsys.readouterr().out.splitlines()
    cpu = next(line for line in table if line.startswith("| CPU"))
    assert cpu.split(" | ")[1:] == ["2 (2 to 2)", "4 (2 to 6) **2×**", "failed, or took too long |"]
    assert table[-1] == "| arrived, % | 100 | 99.9 |  |"
    assert ratios_of(results)["healthy"]["cpu_us"] == {"langfuse": {"median": 2.0, "lowest": 1.0, "highest": 3.0}}


#: The rows of the README's table.
TOLD = (
    ("healthy", "caller_p50_us"),
    ("healthy", "caller_p99_us"),
    ("healthy", "cpu_us"),
    ("healthy", "delivered_per_s"),
    ("queued", "queued_bytes"),
    ("start", "import_ms"),
)


@pytest.mark.parametrize(("readme", "heading"), [("README.md", "What it costs"), ("README.ko.md", "비용")])
def test_the_readme_tells_the_ratios_that_were_measured(readme: str, heading: str) -> None:
    told = section((ROOT / readme).read_text(encoding="utf-8"), heading)
    measured = json.loads((ROOT / "benchmarks/results/ratios.json").read_text(encoding="utf-8"))
    assert f"$ {measured['about']['command']}\n" in told
    header, _, *rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]
    assert [name.lower() for name in header[1:]] == [*PEERS]
    for row, (situation, measure) in zip(rows, TOLD, strict=True):
        ratios = measured["results"][situation][measure]
        assert row[1:] == [_two_digits(ratios[peer]["median"]) for peer in PEERS], (situation, measure)


def _two_digits(ratio: float) -> str:
    return f"{float(f'{ratio:.2g}'):g}"
