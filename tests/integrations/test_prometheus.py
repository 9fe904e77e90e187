"""A tracer's account, as Prometheus scrapes it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import requests
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from evalvault_sdk import StageTracer
from evalvault_sdk.delivery.account import DropReason
from evalvault_sdk.integrations.prometheus import StatsCollector
from evalvault_sdk.testing import CapturingTransport
from tests.support import LiveServer, free_port

PREFIX = "evalvault_sdk_events_"
Value = Callable[..., float]


def values_of(*tracers: StageTracer, by_run: bool = False) -> Value:
    """Register a collector; return what gives the value of a metric now."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(StatsCollector(*tracers, by_run=by_run))

    def value(name: str, **labels: str) -> float:
        found = registry.get_sample_value(PREFIX + name, labels)
        assert found is not None, f"there is no {name} with {labels}"
        return found

    return value


def test_every_event_is_in_one_of_the_metrics(server: LiveServer) -> None:
    with StageTracer(f"run-{uuid.uuid4()}", server.url) as tracer:
        value, destination = values_of(tracer), tracer.destination
        assert value("recorded_total", destination=destination) == 0
        for number in range(5):
            tracer.record_stage("x", attempt=0 if number == 0 else 1)
        tracer.record_batch([{"stage_type": ""}])
        tracer.flush()
        assert value("recorded_total", destination=destination) == 6
        assert value("delivered_total", destination=destination) == 4
        assert value("rejected_total", destination=destination) == 1
        assert value("dropped_total", destination=destination, reason="invalid") == 1
        for name in ("queued", "in_flight", "spooled"):
            assert value(name, destination=destination) == 0


def test_every_reason_of_a_loss_is_there_before_it_happens(server: LiveServer) -> None:
    with StageTracer("r", server.url) as tracer:
        value = values_of(tracer)
        for reason in get_args(DropReason):
            assert value("dropped_total", destination=tracer.destination, reason=reason) == 0


def test_what_waits_on_disk_is_told() -> None:
    port = free_port()
    url, run = f"http://127.0.0.1:{port}", f"run-{uuid.uuid4()}"
    with StageTracer(run, url, durability="journal", shutdown_timeout_s=0.1) as ended:
        value = values_of(ended)
        for _ in range(3):
            ended.record_stage("x")
        assert value("spooled", destination=ended.destination) == 3
    assert value("spooled", destination=ended.destination) == 3


def test_recovered_events_are_counted_once_however_many_tracers_share_the_worker(tmp_path: Path) -> None:
    server = LiveServer(tmp_path / "x.db")
    server.stop()
    with StageTracer("r", server.url, durability="journal", shutdown_timeout_s=0.1) as ended:
        for _ in range(3):
            ended.record_stage("x")
    server = LiveServer(tmp_path / "x.db", port=server.port)
    try:
        with StageTracer("a", server.url) as one, StageTracer("b", server.url) as other:
            value = values_of(one, other, by_run=True)
            one.record_stage("x")
            one.flush()
            for _ in range(100):
                if other.stats().recovered == 3:
                    break
                one.flush(0.1)
                requests.get(f"{server.url}/health", timeout=5)
            assert value("recovered_total", destination=one.destination) == 3
            assert value("recovered_lost_total", destination=one.destination) == 0
            assert value("recorded_total", destination=one.destination, run_id="a") == 1
            assert value("recorded_total", destination=one.destination, run_id="b") == 0
    finally:
        server.stop()


def test_tracers_of_one_destination_are_added_up(server: LiveServer) -> None:
    with StageTracer("a", server.url) as one, StageTracer("b", server.url) as other:
        value = values_of(one, other)
        one.record_stage("x")
        other.record_stage("x")
        assert value("recorded_total", destination=one.destination) == 2


def test_what_is_no_loss_of_an_event_is_counted_too() -> None:
    registry = CollectorRegistry()
    with StageTracer("r", transport=CapturingTransport(), sample_rate=0.0, mask=lambda _: {}) as tracer:
        registry.register(StatsCollector(tracer))
        tracer.record_stage("not drawn")
        tracer.record_stage("kept", status="error", attributes={"text": "a" * 10**6})
        labels = {"destination": tracer.destination}
        for name in ("events_sampled_out", "fields_truncated", "hook_errors"):
            assert registry.get_sample_value(f"evalvault_sdk_{name}_total", labels) == 1


def test_a_scrape_over_http_is_what_prometheus_reads(server: LiveServer) -> None:
    registry = CollectorRegistry(auto_describe=True)
    with StageTracer("r", server.url) as tracer:
        registry.register(StatsCollector(tracer))
        tracer.record_stage("x")
        tracer.flush()
        port = free_port()
        exporter, thread = start_http_server(port, "127.0.0.1", registry)
        try:
            text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        finally:
            exporter.shutdown()
            exporter.server_close()
            thread.join()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {
        PREFIX + name
        for name in (
            *("recorded", "delivered", "rejected", "dropped", "recovered", "recovered_lost"),
            *("queued", "in_flight", "spooled", "sampled_out"),
        )
    } | {"evalvault_sdk_fields_truncated", "evalvault_sdk_hook_errors"}
    (sample,) = families[PREFIX + "delivered"].samples
    assert (sample.labels, sample.value) == ({"destination": tracer.destination}, 1.0)
    assert "run_id" not in text


def test_a_second_collector_in_a_registry_is_refused_not_mixed_up(server: LiveServer) -> None:
    registry = CollectorRegistry(auto_describe=True)
    with StageTracer("a", server.url) as one:
        registry.register(StatsCollector(one))
        with pytest.raises(ValueError, match="Duplicated"):
            registry.register(StatsCollector(one))
