"""What is PostgreSQL's own: EvalVault's tables, roles, other sessions, failures; the rest is in `test_store.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from evalvault_sdk import StageEvent
from evalvault_sdk.errors import StoreError
from evalvault_sdk.server import create_app
from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.store import Store, open_store
from evalvault_sdk.server.store.postgres import PostgresStore
from evalvault_sdk.server.store.sql_snapshot import load_sql
from tests.postgres import Postgres, running_postgres
from tests.server.stores import NOON, event, now
from tests.server.test_routes import ask_app, stage
from tests.support import LiveServer

#: As EvalVault 1.88 makes them, without what stage events do not touch.
EVALVAULT_TABLES = """
CREATE TABLE evaluation_runs (run_id UUID PRIMARY KEY);
CREATE TABLE stage_events (
    id BIGSERIAL PRIMARY KEY,
    run_id UUID NOT NULL REFERENCES evaluation_runs(run_id) ON DELETE CASCADE,
    stage_id TEXT NOT NULL, parent_stage_id TEXT, stage_type TEXT NOT NULL, stage_name TEXT, status TEXT,
    attempt INTEGER DEFAULT 1, started_at TIMESTAMP WITH TIME ZONE, finished_at TIMESTAMP WITH TIME ZONE,
    duration_ms DOUBLE PRECISION, input_ref JSONB, output_ref JSONB, attributes JSONB, metadata JSONB,
    trace_id TEXT, span_id TEXT
);
CREATE UNIQUE INDEX idx_stage_events_run_stage_id ON stage_events(run_id, stage_id);
CREATE INDEX idx_stage_events_run_id ON stage_events(run_id);
CREATE INDEX idx_stage_events_stage_type ON stage_events(stage_type);
CREATE TABLE stage_metrics (
    id BIGSERIAL PRIMARY KEY,
    run_id UUID NOT NULL REFERENCES evaluation_runs(run_id) ON DELETE CASCADE,
    stage_id TEXT NOT NULL, metric_name TEXT NOT NULL, score DOUBLE PRECISION NOT NULL,
    threshold DOUBLE PRECISION, evidence JSONB
);
"""
KNOWN_RUN = "0b8f3c1a-6f7e-4c54-9d1f-0123456789ab"
INSERT = "INSERT INTO stage_events (run_id, stage_id, stage_type) VALUES ('r', %(stage_id)s, 'x')"


def evalvault_database(postgres: Postgres) -> str:
    """Return the URL of a database as EvalVault makes it, with one run."""
    url = postgres.new_database()
    with psycopg.connect(url) as connection:
        connection.execute(EVALVAULT_TABLES)
        connection.execute("INSERT INTO evaluation_runs VALUES (%s)", (KNOWN_RUN,))
    return url


def role_without_create(postgres: Postgres, url: str, *, sequences: str = "USAGE, SELECT", create: bool = False) -> str:
    """Return `url` for a role that may read and write every table, and owns none."""
    role = f"role_{uuid.uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
        connection.execute(f"GRANT {sequences} ON ALL SEQUENCES IN SCHEMA public TO {role}")
        if create:
            connection.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
    return url.replace("//postgres:", f"//{role}:")


def tail_on(store: Store, place: int) -> tuple[list[str], int]:
    """Return the ids beyond a place, and the place to go on from."""
    found, after = store.tail(place, run_id=None, limit=100)
    return [stored.event.stage_id for stored in found], after


def wait_until_stored(store: Store, events: list[StageEvent], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            store.save(events)
        except StoreError:
            assert time.monotonic() < deadline, "it does not recover"
            time.sleep(0.05)
        else:
            return


# A database that EvalVault made.


def test_events_of_runs_that_evalvault_does_not_know_are_refused_beside_those_that_it_does(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    spellings = [KNOWN_RUN, KNOWN_RUN.upper(), KNOWN_RUN.replace("-", ""), f"{{{KNOWN_RUN}}}", f"urn:uuid:{KNOWN_RUN}"]
    unknown = ["nobody", str(uuid.uuid4()), "실행", "0x" + "1" * 30, "_".join("1" * 17)]
    refused = store.save([event(n, run_id=run_id) for n, run_id in enumerate([*spellings, *unknown])])
    assert sorted(refused) == [5, 6, 7, 8, 9]
    assert [stored.event.stage_id for stored in now(store).events(KNOWN_RUN)] == ["s0", "s1", "s2", "s3", "s4"]
    store.close()


def test_over_http_an_unknown_run_is_422_and_a_mixed_batch_207(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    app = create_app(store=store)
    for run_id in ("nobody", str(uuid.uuid4())):
        status, answer = asyncio.run(ask_app(app, stage(run_id)))
        assert (status, answer["error"], answer["index"]) == (422, "Invalid stage event", 0)
        assert "no run of EvalVault's" in answer["details"]
    status, answer = asyncio.run(ask_app(app, {"events": [stage("nobody", 1), stage(KNOWN_RUN, 2), {"run_id": 1}]}))
    assert (status, answer["stored"], answer["run_id"], answer["stage_ids"]) == (207, 1, KNOWN_RUN, ["s2"])
    assert [entry["index"] for entry in answer["rejected"]] == [0, 2]
    app.state.evalvault.close()
    store.close()


@pytest.mark.parametrize("what", ["events", "summary", "debug", "metrics", "traces", "export"])
@pytest.mark.parametrize("run_id", ["nobody", "실행", "00000000-0000-0000-0000-000000000000"])
def test_reading_a_run_that_is_none_of_evalvaults_is_404(postgres: Postgres, what: str, run_id: str) -> None:
    store = open_store(evalvault_database(postgres))
    status, answer = asyncio.run(ask_app(create_app(store=store), None, "GET", f"/api/stage/{what}/{run_id}"))
    store.close()
    assert (status, answer["error"]) == (404, "Run not found")


def test_every_question_is_answered_on_evalvaults_tables(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    stages = [event(n, run_id=KNOWN_RUN, trace_id="t", started_at=NOON, duration_ms=float(n)) for n in range(5)]
    store.save(stages)
    store.save_metrics([StageMetric(KNOWN_RUN, "s1", "x.n", 1.0, 0.5, {"comparison": "max"})])
    loud = KNOWN_RUN.upper()
    assert [stored.event for stored in now(store).events(loud)] == stages
    assert (now(store).count(loud), now(store).run_totals(loud).events) == (5, 5)
    assert [totals.p50_ms for totals in now(store).stage_type_totals(loud)] == [2.0]
    assert [entry.run_id for entry in now(store).runs(prefixes=["0b8"], before=None, limit=5)] == [KNOWN_RUN]
    assert [trace for _, trace in now(store).traces(loud, status=None, before=None, limit=5)] == ["t"]
    assert now(store).metrics(loud, stage_id="s1") == [
        StageMetric(KNOWN_RUN, "s1", "x.n", 1.0, 0.5, {"comparison": "max"})
    ]
    assert tail_on(store, 0)[0] == [f"s{n}" for n in range(5)]
    assert store.tail(0, run_id=loud, limit=2)[0][0].event.run_id == KNOWN_RUN
    store.close()


def test_a_nul_that_jsonb_cannot_hold_costs_its_own_event_only(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    attributes = [{"text": "a\0b"} if n == 3 else {"n": n} for n in range(8)]
    refused = store.save([event(n, run_id=KNOWN_RUN, attributes=attributes[n]) for n in range(8)])
    assert list(refused) == [3]
    assert "NUL" in refused[3]
    assert [stored.event.stage_id for stored in now(store).events(KNOWN_RUN)] == [f"s{n}" for n in range(8) if n != 3]
    store.close()


def test_a_run_that_evalvault_deletes_takes_its_events_with_it(postgres: Postgres) -> None:
    url = evalvault_database(postgres)
    store = open_store(url)
    store.save([event(1, run_id=KNOWN_RUN)])
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM evaluation_runs")
    assert now(store).count(KNOWN_RUN) == 0
    assert list(store.save([event(2, run_id=KNOWN_RUN)])) == [0]
    store.close()


# Starting.


def test_many_processes_that_start_on_an_empty_database_record_each_change_once(postgres: Postgres) -> None:
    url = postgres.new_database()
    with ThreadPoolExecutor(12) as threads:
        for store in threads.map(lambda _: open_store(url), range(12)):
            store.close()
    with psycopg.connect(url) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM evalvault_sdk_schema ORDER BY name")]
    assert names == [
        "postgres_0001_stage_tables.sql",
        "postgres_0002_reading_indexes.sql",
        "postgres_0003_totals_index.sql",
        "postgres_0004_run_counts.sql",
    ]


def test_totals_come_from_an_index_and_not_from_the_events(postgres: Postgres) -> None:
    url = postgres.new_database()
    open_store(url).close()
    with psycopg.connect(url) as connection:
        # An empty table is read whole: what is asked here is whether there is another way.
        connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        for name in ("stage_type_totals.sql", "durations_at.sql"):
            query = load_sql(name).format(stage_type="stage_type = :stage_type")
            for parameter in (":run_id", ":stage_type", ":p50", ":p95", ":p99"):
                query = query.replace(parameter, "'1'")
            plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {query}"))
            assert "Index Only Scan using idx_evalvault_sdk_totals" in plan, plan


def counts(url: str) -> dict[str, int]:
    """Return how many events each run has, by counting them."""
    with psycopg.connect(url) as connection:
        return dict(connection.execute("SELECT run_id::text, COUNT(*) FROM stage_events GROUP BY run_id").fetchall())


def test_a_count_is_kept_and_exact_whoever_writes(postgres: Postgres) -> None:
    url = postgres.new_database()
    store = open_store(url)
    assert isinstance(store, PostgresStore)
    assert "evalvault_sdk_run_counts" in store.dialect.run_count
    store.save([event(n) for n in range(50)])
    store.save([event(n, status="again") for n in range(40, 60)] + [event(1, run_id="other")])
    into = "INSERT INTO stage_events (run_id, stage_id, stage_type)"
    theirs = role_without_create(postgres, url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("REVOKE ALL ON evalvault_sdk_run_counts FROM PUBLIC, " + theirs.split("//")[1].split(":")[0])
    with psycopg.connect(theirs, autocommit=True) as connection:
        for step in (
            f"{into} SELECT 'r', 'n' || n, 'x' FROM generate_series(1, 9) AS n",
            f"{into} VALUES ('r', 's1', 'x') ON CONFLICT DO NOTHING",
            "DELETE FROM stage_events WHERE run_id = 'r' AND stage_id IN ('s3', 's4', 'nobody')",
            "UPDATE stage_events SET run_id = 'third' WHERE stage_id IN ('s5', 's6')",
            "UPDATE stage_events SET run_id = run_id, status = 'seen'",
        ):
            connection.execute(step)
            found = counts(url)
            assert {run: now(store).count(run) for run in found} == found, step
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            connection.execute("DELETE FROM stage_events")
            raise ZeroDivisionError
    assert counts(url) == {"r": 65, "other": 1, "third": 2}
    assert [now(store).count(run) for run in ("r", "other", "third", "none")] == [65, 1, 2, 0]
    assert (store.trim_run("r", 60), now(store).count("r")) == (5, 60)
    assert (store.delete_run("third"), now(store).count("third")) == (2, 0)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE stage_events")
    assert [now(store).count(run) for run in ("r", "other")] == [0, 0]
    store.save([event(1)])
    assert now(store).count("r") == 1
    store.close()


def test_a_count_fits_what_the_same_snapshot_lists_while_several_write_and_delete(postgres: Postgres) -> None:
    url = postgres.new_database()
    stores = [open_store(url) for _ in range(2)]
    ended = threading.Event()

    def write(seed: int) -> None:
        some = random.Random(seed)
        while not ended.is_set():
            store = some.choice(stores)
            store.save([event(n) for n in some.sample(range(200), 40)])
            store.trim_run("r", some.randrange(50, 100))

    with ThreadPoolExecutor(4) as threads:
        writing = [threads.submit(write, seed) for seed in range(4)]
        for _ in range(100):
            with stores[0].snapshot() as view:
                assert view.count("r") == len(list(view.events("r")))
        ended.set()
        for one in writing:
            one.result()
    assert now(stores[1]).count("r") == counts(url)["r"]
    for store in stores:
        store.close()


def test_events_that_were_there_before_are_counted_and_a_run_that_evalvault_deletes_is_not(postgres: Postgres) -> None:
    url = evalvault_database(postgres)
    insert = "INSERT INTO stage_events (run_id, stage_id, stage_type) VALUES (%s, %s, 'x')"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(insert, (KNOWN_RUN, "before"))
        store = open_store(url)
        assert isinstance(store, PostgresStore)
        assert "evalvault_sdk_run_counts" in store.dialect.run_count
        connection.execute(insert, (KNOWN_RUN, "after"))
        assert now(store).count(KNOWN_RUN.upper()) == 2
        connection.execute("DELETE FROM evaluation_runs")
    assert now(store).count(KNOWN_RUN) == 0
    store.close()


def test_where_a_trigger_is_not_at_work_events_are_counted_one_by_one(postgres: Postgres) -> None:
    url = postgres.new_database()
    open_store(url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE stage_events DISABLE TRIGGER evalvault_sdk_deleted")
        store = open_store(url)
        store.save([event(n) for n in range(5)])
        connection.execute("DELETE FROM stage_events WHERE stage_id = 's1'")
    assert now(store).count("r") == 4
    store.close()


def test_tables_without_our_record_are_used_as_they_are(postgres: Postgres) -> None:
    url = evalvault_database(postgres)
    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO stage_events (run_id, stage_id, stage_type) VALUES (%s, 'theirs', 'x')", (KNOWN_RUN,)
        )
    store = open_store(url)
    assert [stored.event.stage_id for stored in now(store).events(KNOWN_RUN)] == ["theirs"]
    store.close()
    with psycopg.connect(url) as connection:
        kind = connection.execute("SELECT pg_typeof(run_id)::text, pg_typeof(attributes)::text FROM stage_events")
        assert kind.fetchone() == ("uuid", "jsonb")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("@127.0.0.1", "@nohost.invalid"), "nohost.invalid"),
        (("@127.0.0.1:", "@127.0.0.1:1"), "127.0.0.1"),
        (("/postgres", "/nothing"), '"nothing" does not exist'),
        (("//postgres:", "//nobody:"), '"nobody" does not exist'),
    ],
)
def test_a_database_that_cannot_be_had_is_named_without_its_password(
    postgres: Postgres, change: tuple[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres.url()
    head, found, tail = url.rpartition(change[0]) if change[0].startswith("/p") else url.partition(change[0])
    if change[1].endswith(":1"):
        tail = tail.partition("/")[1] + tail.partition("/")[2]
    assert found
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreError) as caught:
        open_store(f"{head}{change[1]}{tail}")
    assert words in str(caught.value)
    assert "secret-word" not in f"{caught.value} {caught.value.__cause__!r} {caplog.text}"


# Other sessions.


def test_batches_that_hold_each_other_up_are_stored_all(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    stages = [event(n) for n in range(300)]

    def resend(seed: int) -> None:
        store.save(random.Random(seed).sample(stages, len(stages)))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(resend, range(2))) == [None] * 2
    assert sorted(stored.event.stage_id for stored in now(store).events("r")) == sorted(e.stage_id for e in stages)
    store.close()


def test_an_open_transaction_is_waited_for_by_streams_with_all_after_it(postgres: Postgres) -> None:
    url = postgres.new_database()
    store = open_store(url)
    store.save([event(0)])
    _, place = store.tail(None, run_id=None, limit=10)
    with psycopg.connect(url) as slow, psycopg.connect(url) as given_up:
        given_up.execute(INSERT, {"stage_id": "given up"})
        slow.execute(INSERT, {"stage_id": "slow"})
        store.save([event(1)])
        assert tail_on(store, place) == ([], place)
        given_up.rollback()
    assert tail_on(store, place)[0] == ["slow", "s1"]
    store.close()


def test_deleting_the_newest_events_moves_no_stream_back(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    store.save([event(n) for n in range(5)])
    _, place = tail_on(store, 0)
    store.delete_run("r")
    assert tail_on(store, place) == ([], place)
    store.save([event(9)])
    assert tail_on(store, place)[0] == ["s9"]
    store.close()


def test_a_lock_held_elsewhere_is_an_error_in_time_and_then_forgotten(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.postgres._LOCK_TIMEOUT_S", 1)
    url = postgres.new_database()
    store = open_store(url)
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE stage_events IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        app = create_app(store=store)
        status, answer = asyncio.run(ask_app(app, stage("r")))
        assert (status, answer["error"]) == (503, "Database unavailable")
        assert time.monotonic() - started < 3
        app.state.evalvault.close()
    store.save([event(1)])
    store.close()


def test_a_statement_that_takes_too_long_is_ended(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.postgres._STATEMENT_TIMEOUT_S", 1)
    store = open_store(postgres.new_database())
    with pytest.raises(StoreError, match="statement timeout"), store.snapshot() as view:
        list(view.ask("SELECT pg_sleep(5)", {}))  # type: ignore[attr-defined]
    store.save([event(1)])
    store.close()


# Failures.


@pytest.mark.parametrize("code", ["53100", "53200", "P0001", "XX000", "58030"])
def test_a_database_that_is_full_or_broken_stores_again_once_it_is_not(postgres: Postgres, code: str) -> None:
    url = postgres.new_database()
    store = open_store(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = '{code}'; END $$"
        )
        connection.execute(
            "CREATE TRIGGER full_disk BEFORE INSERT ON stage_events FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )
        for _ in range(20):
            with pytest.raises(StoreError, match="No space left"):
                store.save([event(1)])
        connection.execute("DROP TRIGGER full_disk ON stage_events")
        store.save([event(1)])
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ((sessions,),) = connection.execute(query).fetchall()
    assert sessions <= 1 + 12, "connections come back after errors"
    store.close()


def test_sessions_that_are_killed_at_random_lose_nothing_and_double_nothing(postgres: Postgres) -> None:
    url = postgres.new_database()
    store = open_store(url)
    ended = threading.Event()

    def kill() -> None:
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            while not ended.wait(0.5):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    (url.rpartition("/")[2],),
                )

    killer = threading.Thread(target=kill)
    killer.start()

    def send(number: int) -> None:
        for step in range(20):
            wait_until_stored(store, [event(run_id=f"r{number}", stage_id=f"{step}-{n}") for n in range(20)])

    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(send, range(4)))
    finally:
        ended.set()
        killer.join()
    for number in range(4):
        wait_until_stored(store, [event(run_id=f"r{number}", stage_id="last")])
        found = [stored.event.stage_id for stored in now(store).events(f"r{number}")]
        assert found == [*(f"{step}-{n}" for step in range(20) for n in range(20)), "last"]
    store.close()


def test_no_connection_to_be_had_is_an_error_within_seconds_and_heals(postgres: Postgres) -> None:
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    store = open_store(url)
    with psycopg.connect(postgres.url(), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        started = time.monotonic()
        with pytest.raises(StoreError):
            store.save([event(1)])
        assert time.monotonic() - started < 7
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    wait_until_stored(store, [event(1)])
    store.close()


def test_a_crash_of_the_database_under_load_costs_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    import signal

    acknowledged: set[str] = set()
    statuses: set[int] = set()
    ended = threading.Event()

    def send(server: LiveServer, worker: int) -> None:
        for step in range(100_000):
            if ended.is_set():
                return
            ids = [f"{worker}-{step}-{number}" for number in range(20)]
            answer = server.post({"events": [stage("r") | {"stage_id": stage_id} for stage_id in ids]})
            statuses.add(answer.status_code)
            if answer.status_code == 200:
                acknowledged.update(ids)
            else:
                assert answer.headers["Retry-After"]
                time.sleep(0.1)

    with running_postgres() as postgres:
        server = LiveServer(tmp_path / "x.db", "--db", postgres.new_database())
        threads = [threading.Thread(target=send, args=(server, worker)) for worker in range(4)]
        for thread in threads:
            thread.start()
        try:
            for how in (signal.SIGQUIT, signal.SIGKILL):
                time.sleep(0.7)
                postgres.stop(how)
                time.sleep(0.5)
                postgres.start()
                before = len(acknowledged)
                deadline = time.monotonic() + 20
                while len(acknowledged) < before + 100:
                    assert time.monotonic() < deadline, "it does not recover"
                    time.sleep(0.05)
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        answer = requests.get(f"{server.url}/api/stage/export/r", params={"format": "jsonl"}, timeout=60)
        lines = answer.text.splitlines()
        assert requests.get(f"{server.url}/ready", timeout=10).ok
        server.stop()
        assert "secret-word" not in server.db.with_suffix(".log").read_text()
    assert statuses <= {200, 503}
    stored = {line.split('"stage_id":"')[1].split('"')[0] for line in lines}
    assert len(stored) == len(lines)
    assert acknowledged <= stored


def test_a_reader_that_leaves_in_the_middle_leaves_its_connection(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    store.save([event(n) for n in range(3000)])
    for _ in range(30):
        with store.snapshot() as view:
            rows: Any = view.events("r")
            next(rows)
        del rows
    with store.snapshot() as view:
        assert view.count("r") == 3000
    store.close()


def test_every_copy_of_a_refused_event_is_refused_and_a_better_one_is_stored(postgres: Postgres) -> None:
    store = open_store(evalvault_database(postgres))
    assert sorted(store.save([event(1, run_id="nobody"), event(1, run_id="nobody")])) == [0, 1]
    store.close()
    url = postgres.new_database()
    store = open_store(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE stage_events ADD CHECK (length(stage_name) < 10)")
    too_long = event(1, stage_name="x" * 20)
    assert sorted(store.save([event(1, stage_name="good"), too_long])) == [1]
    assert [stored.event.stage_name for stored in now(store).events("r")] == ["good"]
    assert sorted(store.save([too_long, event(1, stage_name="last"), event(2)])) == []
    assert [stored.event.stage_name for stored in now(store).events("r")] == ["last", None]
    store.close()


def test_metrics_that_are_stored_by_several_at_once_are_there_once(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    metrics = [StageMetric("r", f"s{n}", "x.n", float(n)) for n in range(200)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: store.save_metrics(metrics), range(4)))
    assert len(now(store).metrics("r")) == 200
    store.close()


def test_deleting_and_storing_the_same_events_hold_each_other_up_never(postgres: Postgres) -> None:
    store = open_store(postgres.new_database())
    events = [event(n) for n in range(200)]
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for seed in range(6):
                if number:
                    store.save(random.Random(seed * number).sample(events, len(events)))
                else:
                    store.trim_run("r", 50)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert faults == []
