"""PostgreSQL in trouble: open transactions, other programs, outages, poolers, few rights. Nothing is skipped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from evalvault_sdk.errors import ConfigurationError, StoreError
from evalvault_sdk.server import create_app
from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.store import EventFilter, MemoryStore, open_store
from evalvault_sdk.server.store import postgres as module
from evalvault_sdk.server.store.postgres import PostgresStore
from tests.path.test_many_servers import LiveReader, run_clients, servers_on, until_still
from tests.postgres import Postgres, running_postgres
from tests.server.stores import NOON, event, now
from tests.server.test_postgres import INSERT, KNOWN_RUN, evalvault_database, role_without_create, tail_on
from tests.server.test_routes import ask_app, stage
from tests.support import clean_environment, wait_for

# What a live stream skips.


def test_an_event_whose_transaction_was_the_newest_when_a_stream_looked_is_not_skipped(postgres: Postgres) -> None:
    # pg_snapshot_xmax is one past the newest *completed* transaction, so an open one may have that very number.
    url = postgres.new_database()
    store = open_store(url)
    store.save([event(0)])
    seen, place = tail_on(store, 0)
    with psycopg.connect(url) as slow:
        slow.execute(INSERT, {"stage_id": "slow"})
        more, place = tail_on(store, place)
        seen += more
        store.save([event(1)])
        more, place = tail_on(store, place)
        seen += more
    for _ in range(3):
        more, place = tail_on(store, place)
        seen += more
    store.close()
    assert sorted(seen) == ["s0", "s1", "slow"]


def test_the_very_first_event_is_not_skipped_by_a_stream_that_was_there_before(postgres: Postgres) -> None:
    # last_value of a sequence is 1 before anything was given (is_called is false).
    url = postgres.new_database()
    store = open_store(url)
    _, place = tail_on(store, 0)
    with psycopg.connect(url) as slow:
        slow.execute(INSERT, {"stage_id": "slow"})
        store.save([event(1)])
        seen, place = tail_on(store, place)
    for _ in range(3):
        more, place = tail_on(store, place)
        seen += more
    store.close()
    assert sorted(seen) == ["s1", "slow"]


def test_a_stream_does_not_skip_what_another_stream_of_its_process_found_settled(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is settled is found out for all: here it moves on before this stream takes its view, and after it was told.
    url = postgres.new_database()
    store = open_store(url)
    store.save([event(0)])
    _, place = tail_on(store, 0)
    slow = psycopg.connect(url)
    slow.execute(INSERT, {"stage_id": "slow"})
    store.save([event(1)])
    reading = threading.local()
    original = PostgresStore.snapshot

    def with_another_stream_in_between(self: PostgresStore) -> Any:
        if not getattr(reading, "inner", False):
            reading.inner = True
            slow.commit()
            store.tail(place, run_id=None, limit=10)
        return original(self)

    monkeypatch.setattr(PostgresStore, "snapshot", with_another_stream_in_between)
    seen, place = tail_on(store, place)
    monkeypatch.undo()
    slow.close()
    for _ in range(3):
        more, place = tail_on(store, place)
        seen += more
    store.close()
    assert sorted(seen) == ["s1", "slow"]


def test_an_event_of_another_program_that_had_its_number_before_its_transaction_id_is_not_skipped(
    postgres: Postgres,
) -> None:
    # As EvalVault writes: a row waits for the same row of somebody else, its number taken, without a transaction id.
    url = postgres.new_database()
    store = open_store(url)
    upsert = f"{INSERT} ON CONFLICT (run_id, stage_id) DO UPDATE SET status = 'again'"
    first, second = psycopg.connect(url), psycopg.connect(url)
    first.execute(upsert, {"stage_id": "both"})
    waiting = threading.Thread(target=second.execute, args=(upsert, {"stage_id": "both"}))
    waiting.start()
    with psycopg.connect(url, autocommit=True) as looking:
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = %s"
        wait_for(lambda: looking.execute(query, (second.info.backend_pid,)).fetchone() == (1,))
    _, place = tail_on(store, 0)
    store.save([event(1)])
    first.rollback()
    waiting.join()
    seen, place = tail_on(store, place)
    second.commit()
    for _ in range(3):
        more, place = tail_on(store, place)
        seen += more
    for connection in (first, second):
        connection.close()
    store.close()
    assert sorted(seen) == ["both", "s1"]


def test_live_streams_miss_nothing_under_many_writers_and_two_servers(postgres: Postgres, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4()}"
    with servers_on(postgres.new_database(), tmp_path, 2) as servers:
        readers = [LiveReader(server, run_id) for server in servers for _ in range(3)]
        clients = run_clients(run_id, [server.port for server in servers], batches=40, size=20)
        until_still(lambda: sum(len(reader.seen) for reader in readers))
        for server in servers:
            server.stop()
        for reader in readers:
            reader.join()
    stored = sum(client.acknowledged for client in clients)
    assert [(len(reader.seen), len(set(reader.seen))) for reader in readers] == [(stored, stored)] * len(readers)


def test_a_transaction_in_another_database_does_not_hold_up_live_streams(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    with psycopg.connect(postgres.new_database()) as elsewhere:
        elsewhere.execute("CREATE TABLE import_of_an_hour ()")
        store.save([event(1)])
        seen: list[str] = []
        place = 0
        for _ in range(5):
            more, place = tail_on(store, place)
            seen += more
    store.close()
    assert seen == ["s1"]


# A database that EvalVault made.


def test_a_run_of_evalvaults_database_is_deleted_with_its_stored_metrics(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    store.save([event(n, run_id=KNOWN_RUN) for n in range(3)])
    store.save_metrics([StageMetric(KNOWN_RUN, "s1", "x.n", 1.0)])
    assert store.delete_run(KNOWN_RUN) == 3
    store.close()


def test_old_events_of_evalvaults_database_are_swept_with_their_stored_metrics(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    store.save([event(1, run_id=KNOWN_RUN, finished_at=NOON)])
    store.save_metrics([StageMetric(KNOWN_RUN, "s1", "x.n", 1.0)])
    assert store.sweep(0, older_than=NOON + timedelta(days=1), limit=10) == (None, 1)
    store.close()


def test_one_event_under_two_spellings_of_its_run_is_stored_once(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    assert store.save([event(1, run_id=KNOWN_RUN), event(1, run_id=KNOWN_RUN.upper(), status="last")]) == {}
    assert [stored.event.status for stored in now(store).events(KNOWN_RUN)] == ["last"]
    store.close()


@pytest.mark.parametrize("number", [1e300, 1e22, 2.0**64])
def test_a_large_number_does_not_make_the_attributes_beside_it_unreadable(postgres: Postgres, number: float) -> None:
    # JSONB keeps 1e22 as twenty-three digits, which reads back as a whole number that orjson does not write.
    store = open_store(evalvault_database(postgres))
    store.save([event(1, run_id=KNOWN_RUN, attributes={"query": "질문", "score": number})])
    (found,) = now(store).events(KNOWN_RUN)
    store.close()
    assert found.event.attributes == {"query": "질문", "score": number}


# What PostgreSQL refuses, and SQLite does not.


def test_an_offset_that_python_knows_is_stored(postgres: Postgres) -> None:
    moment = datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=23)))
    store = open_store(postgres.new_database())
    refused = store.save([event(1, started_at=moment)])
    store.close()
    assert refused == {}


@pytest.mark.parametrize("path", ["events/nob\0dy", "summary/\0", "metrics/a\0b"])
def test_a_question_with_a_nul_is_no_failure_of_the_database(postgres: Postgres, path: str) -> None:
    store = open_store(postgres.new_database())
    store.save([event(1)])
    status, _ = asyncio.run(ask_app(create_app(store=store), None, "GET", f"/api/stage/{path}"))
    store.close()
    assert status in (404, 422)


def test_a_filter_with_a_nul_finds_nothing(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    store.save([event(1)])
    try:
        assert now(store).count("r", EventFilter(stage_type="\0")) == 0
    finally:
        store.close()


# Recovery.


def test_a_server_writes_again_when_the_database_is_no_longer_read_only(postgres: Postgres) -> None:
    # Providers set this when a disk is nearly full. A session keeps what held when it began.
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        with psycopg.connect(postgres.url(), autocommit=True) as elsewhere:
            connection.execute("SET default_transaction_read_only = off")
            elsewhere.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            store = open_store(url)
            elsewhere.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            elsewhere.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                (name, connection.info.backend_pid),
            )
            with pytest.raises(StoreError, match="read-only"):
                store.save([event(1)])
            elsewhere.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    for _ in range(5):
        try:
            store.save([event(1)])
        except StoreError:
            continue
        break
    else:
        pytest.fail("still read-only, and would be for as long as the connection is in use")
    store.close()


def test_a_server_stores_again_soon_after_an_outage(tmp_path: Path) -> None:
    # psycopg_pool tries again after 1, 2, 4, ... 128 seconds: the longer it was away, the later it is found.
    with running_postgres() as postgres:
        store = open_store(postgres.new_database())
        store.save([event(1)])
        postgres.stop()
        back_at = time.monotonic() + 7.5
        while time.monotonic() < back_at:
            with pytest.raises(StoreError):
                store.save([event(2)])
        postgres.start()
        started = time.monotonic()
        while True:
            try:
                store.save([event(2)])
            except StoreError:
                continue
            break
        store.close()
        assert time.monotonic() - started < 4


# Bounds.


def test_what_waits_for_a_stuck_database_is_bounded_in_bytes_too() -> None:
    # A request that was told "too slow" no longer counts, but its events still wait in memory.
    release = threading.Event()

    class Stuck(MemoryStore):
        def save(self, events: Any) -> Any:
            release.wait(30)
            return super().save(events)

    store = Stuck()
    app = create_app(store=store, store_timeout_s=0.1, max_waiting_bytes=1 << 20)
    large = {"text": "x" * 200_000}

    async def post() -> list[str]:
        return [(await ask_app(app, stage("r", n, attributes=large)))[1]["error"] for n in range(20)]

    try:
        answers = asyncio.run(post())
    finally:
        release.set()
        app.state.evalvault.close()
    assert answers.count("Database slow") * 200_000 <= 1 << 20, answers


def test_a_batch_that_is_wholly_refused_costs_no_transaction_for_each_event(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    many = [event(n, run_id=KNOWN_RUN, attributes={"text": "a\0b"}) for n in range(2_000)]
    started = time.monotonic()
    refused = store.save(many)
    took_s = time.monotonic() - started
    store.close()
    assert len(refused) == len(many)
    assert took_s < 1, "all that is stored beside them waits as long"


def test_clients_that_resend_the_same_events_in_other_orders_do_not_hold_each_other_up(postgres: Postgres) -> None:
    # Each deadlock costs a second (deadlock_timeout), and after six the batch is answered 503.
    store = open_store(postgres.new_database())
    stages = [event(n) for n in range(300)]

    def resend(seed: int) -> None:
        for _ in range(3):
            store.save(random.Random(seed).sample(stages, len(stages)))

    started = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(resend, range(4)))
    store.close()
    assert time.monotonic() - started < 3


def test_slow_readers_leave_connections_to_those_who_store(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    store.save([event(1)])
    done = threading.Event()

    def read_slowly() -> None:
        with contextlib.suppress(StoreError), store.snapshot() as view:  # who finds no room is told so
            view.count("r")
            done.wait(20)

    readers = [threading.Thread(target=read_slowly) for _ in range(16)]
    for reader in readers:
        reader.start()
    time.sleep(1)
    try:
        store.save([event(2)])
    finally:
        done.set()
        for reader in readers:
            reader.join()
        store.close()


def test_the_traces_of_an_agent_with_few_and_long_ones_come_at_once(postgres: Postgres) -> None:
    # Each stage looks for a later one of its trace, and finds it after reading half of the trace.
    url = postgres.new_database()
    store = open_store(url)
    with psycopg.connect(url, autocommit=True) as connection:
        insert = "INSERT INTO stage_events (run_id, stage_id, stage_type, status, trace_id, attributes, metadata) "
        of_each = "SELECT %s, 's' || n, 'x', 'success', 't' || n %% %s, '{}', '{}' FROM generate_series(1, %s) AS n"
        connection.execute(insert + of_each, ("others", 50_000, 250_000))
        connection.execute(insert + of_each, ("r", 2, 20_000))
        connection.execute("ANALYZE stage_events")
    started = time.monotonic()
    assert [trace for _, trace in now(store).traces("r", status=None, before=None, limit=20)] == ["t0", "t1"]
    took_s = time.monotonic() - started
    store.close()
    assert took_s < 1.5


# Group commit.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_raises_what_is_no_exception_does_not_end_storing_for_ever() -> None:
    class Odd(MemoryStore):
        broken = True

        def save(self, events: Any) -> Any:
            if self.broken:
                self.broken = False
                raise SystemExit("an extension written in another language, a greenlet that is killed")
            return super().save(events)

    app = create_app(store=Odd(), store_timeout_s=1.0)
    statuses = [asyncio.run(ask_app(app, stage("r", n)))[0] for n in range(2)]
    assert statuses[0] in (500, 503)
    assert statuses[1] == 200


# Starting.


def test_a_role_that_may_not_create_serves_tables_that_are_there(postgres: Postgres) -> None:
    url = postgres.new_database()
    open_store(url).close()
    store = open_store(role_without_create(postgres, url))
    assert store.save([event(1)]) == {}
    store.close()


def test_a_role_that_does_not_own_evalvaults_tables_serves_them(postgres: Postgres) -> None:
    url = evalvault_database(postgres)
    store = open_store(role_without_create(postgres, url))
    assert store.save([event(1, run_id=KNOWN_RUN)]) == {}
    store.close()


def test_a_role_that_may_use_a_sequence_may_follow_it(postgres: Postgres) -> None:
    url = postgres.new_database()
    open_store(url).close()
    limited = role_without_create(postgres, url, sequences="USAGE", create=True)
    store = open_store(limited)
    store.save([event(1)])
    assert tail_on(store, 0)[0] == ["s1"]
    store.close()


def test_a_server_waits_for_another_that_is_changing_the_schema(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_TIMEOUT_S", 1)  # for 10: an index on many events takes longer
    url = postgres.new_database()
    other = psycopg.connect(url)
    other.execute("SELECT pg_advisory_xact_lock(%s)", (module._SCHEMA_LOCK,))
    timer = threading.Timer(2, other.commit)
    timer.start()
    try:
        open_store(url).close()
    finally:
        timer.join()
        other.close()


@pytest.mark.parametrize("password", ["secret word", "secret%zzword", "pre@secret", "secret/word"])
def test_a_password_that_was_not_escaped_is_not_shown_in_the_error(password: str) -> None:
    with pytest.raises((StoreError, ConfigurationError)) as caught:
        open_store(f"postgresql://user:{password}@127.0.0.1:1/name")
    assert "secret" not in str(caught.value)


def test_several_workers_on_any_free_port_say_which(postgres: Postgres, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evalvault_sdk.cli", "serve", "--port", "0", "--workers", "2"]
    said = tmp_path / "said"
    with said.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--db", postgres.new_database()], env=clean_environment(), stdout=output, stderr=output
        )
        try:
            wait_for(lambda: b"http://127.0.0.1:" in said.read_bytes(), 30)
            text = said.read_text().split("http://127.0.0.1:")[1]
            port = int("".join(character for character in text[:6] if character.isdigit()))

            def answers() -> bool:
                try:
                    return requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok
                except requests.RequestException:
                    return False

            wait_for(answers, 8)
        finally:
            server.terminate()
            server.wait(20)


# A transaction pooler.


def test_times_are_read_in_a_session_that_only_a_pooler_has_set_up(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Behind a pooler in transaction mode the next transaction may be in a session that was never configured.
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET datestyle = 'German, DMY'")
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET timezone = 'Asia/Seoul'")
    store = open_store(url)
    store.save([event(1, started_at=NOON)])
    (found,) = now(store).events("r")
    store.close()
    assert found.event.started_at == NOON


def test_a_commit_waits_for_the_disk_in_a_session_that_only_a_pooler_has_set_up(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.new_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET synchronous_commit = off")
        store = open_store(url)
        connection.execute("CREATE TABLE said (how TEXT)")
        connection.execute(
            "CREATE FUNCTION say() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN INSERT INTO said VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
        )
        connection.execute("CREATE TRIGGER say AFTER INSERT ON stage_events EXECUTE FUNCTION say()")
        store.save([event(1)])
        store.close()
        assert connection.execute("SELECT DISTINCT how FROM said").fetchall() == [("on",)]
