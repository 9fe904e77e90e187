"""The guide for operators is true: it names every line of the log and every counter, and none that there is not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest
import yaml
from typer.main import get_command

from evalvault_sdk import FlushReport, Settings, StageTracer
from evalvault_sdk.cli.app import app
from evalvault_sdk.delivery.account import DropReason
from evalvault_sdk.delivery.transport.http import _ADVICE
from evalvault_sdk.integrations.prometheus import StatsCollector
from evalvault_sdk.server import ServerSettings, commit, program
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.store import SQLiteStore
from evalvault_sdk.server.telemetry import Telemetry
from tests.markdown import code_blocks, code_spans, section, table_rows
from tests.support import ROOT, LiveServer, run_block

PACKAGE = ROOT / "evalvault_sdk"
GUIDE = (ROOT / "docs/guides/OPERATIONS.md").read_text(encoding="utf-8")
LOG = section(GUIDE, "Lines of the log")
COUNTERS = section(GUIDE, "Counters")
#: What stands in a message for a value, in the source and in the guide.
_VALUE = re.compile(r"%(?:\(\w+\))?[\d.]*[sdrf]")
_NAMED_VALUE = re.compile(r"<[^<>]*>")
_LEVELS = {
    "info": "`INFO`",
    "warning": "`WARNING`",
    "error": "`ERROR`",
    "exception": "`ERROR`, with a traceback",
    "log": "`WARNING` if it failed; with `--log-requests` else `INFO`",
}


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the level and the text of each line that a module says in the log."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tuples = {
        node.targets[0].id: node.value.elts
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "warn":
            level, place = "warning", 0
        elif name.endswith("_log.warn"):
            level, place = "warning", 1  # the first argument is a key
        elif name.startswith(("logger.", "logger().")):
            level, place = name.rpartition(".")[2], 0
            if level == "log":
                place = 1
            elif level == "error" and any(keyword.arg == "exc_info" for keyword in node.keywords):
                level = "exception"
        else:
            continue
        said: Any = node.args[place]
        if isinstance(said, ast.Starred):
            said = tuples[ast.unparse(said.value)][0]
        text = said.value if isinstance(said, ast.Constant) else None
        assert isinstance(text, str), f"{path.name}:{node.lineno} says what cannot be read here"
        yield level, _VALUE.sub("<>", text.removeprefix("evalvault: "))


def said_by(*, the_server: bool) -> set[tuple[str, str]]:
    """Return the level and the text of all lines of the client's log, or of the server's."""
    said: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0]
        if part not in ("cli", "log.py") and (part == "server") is the_server:
            said.update(messages(path))
    return said


def explained(text: str) -> list[list[str]]:
    """Return the rows of tables, the lines of the log in the first column as the source has them."""
    return [[_NAMED_VALUE.sub("<>", next(code_spans(row[0]))), *row[1:]] for row in table_rows(text)]


def first_codes(text: str) -> list[str]:
    return [next(code_spans(row[0])) for row in table_rows(text)]


def test_every_line_of_the_clients_log_is_explained_and_there_is_no_other() -> None:
    said = said_by(the_server=False)
    rows = explained(section(LOG, "The client").split("\n#### ")[0])
    assert [text for level, text in said if level != "warning"] == [rows[-1][0]]
    assert sorted(row[0] for row in rows) == sorted({text for _, text in said})


def test_every_line_of_the_servers_log_is_explained_with_its_level_and_there_is_no_other() -> None:
    rows = explained(section(LOG, "The server"))
    assert sorted((row[0], row[1]) for row in rows) == sorted(
        (text, _LEVELS[level]) for level, text in said_by(the_server=True)
    )


def test_every_status_with_an_advice_of_its_own_is_explained() -> None:
    reasons = section(LOG, "Why it cannot deliver")
    assert {f"HTTP {status}" for status in _ADVICE} <= set(code_spans(reasons))


def test_every_counter_and_every_reason_of_a_loss_is_explained() -> None:
    stats = section(COUNTERS, "`tracer.stats()`").split("\n#### ")[0]
    assert first_codes(stats) == [field.name for field in attrs.fields(FlushReport)]
    assert first_codes(section(COUNTERS, "Why events were lost")) == ["dropped", *get_args(DropReason)]


def test_every_metric_of_the_client_for_prometheus_is_explained() -> None:
    with StageTracer("run", durability="memory") as tracer:
        names = {name_of(metric) for metric in StatsCollector(tracer).collect()}
    assert set(first_codes(section(COUNTERS, "Prometheus: the client"))) == names


def test_every_metric_of_the_server_is_explained_with_its_labels() -> None:
    telemetry = Telemetry()
    rows = [row for row in table_rows(section(COUNTERS, "Prometheus: the server")) if row[0].startswith("`evalvault_")]
    made = [value for value in vars(telemetry).values() if hasattr(value, "_labelnames")]
    assert {next(code_spans(row[0])): list(code_spans(row[1])) for row in rows} == {
        name_of(metric): list(instrument._labelnames) for instrument in made for metric in instrument.collect()
    }


def name_of(metric: Any) -> str:
    return f"{metric.name}_total" if metric.type == "counter" else str(metric.name)


def test_every_reason_of_a_refusal_is_explained() -> None:
    reasons = {str(attrs.fields(ApiError).reason.default)}
    for path in (PACKAGE / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ApiError", "come_again"):
                for keyword in node.keywords:
                    if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                        reasons.add(str(keyword.value.value))
    rows = table_rows(section(COUNTERS, "Prometheus: the server"))
    listed = [next(code_spans(row[0])) for row in rows if not row[0].startswith("`evalvault_")]
    assert listed[0] == "reason"
    assert set(listed[1:]) == reasons


def test_the_bounds_of_the_client_are_its_defaults() -> None:
    settings = Settings(run_id="run")
    mebibyte = 1 << 20
    rows = {row[0]: row[-1] for row in rows_of(section(section(GUIDE, "Sizing"), "The client"))}
    spool = settings.spool_max_bytes // mebibyte
    assert rows["memory, each tracer"] == (
        f"{settings.max_queue_bytes // mebibyte} MiB, or {settings.max_queue_events:,} events"
    )
    assert rows["memory, the request being sent"] == f"{settings.max_batch_bytes // mebibyte} MiB"
    with_dead_letters = f"{spool} MiB + {2 * spool // 16} MiB + 4 MiB each"
    assert rows["disk, each server address, all processes of the folder together"] == with_dead_letters
    assert rows["age on disk"] == f"{settings.spool_max_age_s / 86_400:g} days"
    assert rows["time at the end of the process"] == f"{settings.shutdown_timeout_s:g} s"
    for rate, said in rows_of(section(GUIDE, "Sizing"))[-3:]:
        seconds = settings.spool_max_bytes / (int(rate.replace(",", "")) * 700)
        assert said == (f"{seconds // 3600:.0f} hours" if seconds >= 3600 else f"{seconds // 60:.0f} minutes")


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_server_is_left_the_time_that_it_takes_to_end() -> None:
    manifests = [yaml.safe_load(block) for block in code_blocks("yaml", GUIDE)]
    service, server = (manifest["spec"]["template"]["spec"] for manifest in manifests)
    assert server["terminationGracePeriodSeconds"] > 5 + program._GRACE_S + commit._CLOSE_S
    assert service["terminationGracePeriodSeconds"] > Settings(run_id="run").shutdown_timeout_s


def test_every_variable_and_every_option_of_the_command_is_one() -> None:
    known = {field.metadata["env"] for kind in (Settings, ServerSettings) for field in attrs.fields(kind)}
    assert set(re.findall(r"EVALVAULT_[A-Z_]+[A-Z]", GUIDE)) <= known
    commands: Any = get_command(app)
    named = [span.split() for span in code_spans(GUIDE) if span.startswith("evalvault-sdk ")]
    named += [
        line.removeprefix("$ ").split("#")[0].split() for line in "".join(code_blocks("console", GUIDE)).splitlines()
    ]
    assert len(named) > 5
    for _, *words in named:
        command = commands
        for word in words:
            if word.startswith("--"):
                assert any(word in option.opts for option in command.params), words
            elif hasattr(command, "commands"):
                assert word in command.commands, words
                command = command.commands[word]


BLOCKS = code_blocks("python", GUIDE)


@pytest.mark.parametrize("number", range(5))
def test_every_block_of_code_runs(server: LiveServer, tmp_path: Path, number: int) -> None:
    assert len(BLOCKS) == 5
    SQLiteStore(tmp_path / "eval.db").close()
    done = run_block(BLOCKS[number], tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    if "copy.db" in BLOCKS[number]:
        SQLiteStore(tmp_path / "copy.db", read_only=True).close()
        assert (tmp_path / "copy.db").stat().st_mode & 0o077 == 0
