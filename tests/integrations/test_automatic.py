"""`evalvault_sdk.instrument()`: what is installed is instrumented, and what was done is said."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import evalvault_sdk
from evalvault_sdk import ConfigurationError, MissingDependencyError, StageTracer
from evalvault_sdk.integrations import automatic
from tests.support import said_without


class Framework:
    """An integration that remembers what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.tracers: list[object] = []
        self.undone = 0

    def instrument(self, tracer: object) -> Framework:
        if self.error is not None:
            raise self.error
        self.tracers.append(tracer)
        return self

    def undo(self) -> None:
        self.undone += 1


@pytest.fixture
def frameworks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Framework]:
    """Two that are installed, and one that is not."""
    made: dict[str, Framework] = {"one": Framework(), "two": Framework(), "absent": Framework()}
    table = {}
    for name in made:
        module: Any = types.ModuleType(f"evalvault_sdk.integrations.{name}")
        module.instrument_it = lambda tracer, name=name: made[name].instrument(tracer)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        table[name] = ("no_such_package" if name == "absent" else "json", name, "instrument_it")
    monkeypatch.setattr(automatic, "_FRAMEWORKS", table)
    return made


def test_what_is_installed_is_instrumented_and_what_was_done_is_said(
    frameworks: dict[str, Framework], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "evalvault_sdk")
    done = evalvault_sdk.instrument()
    assert (done.instrumented, done.missing, dict(done.failed)) == (("one", "two"), ("absent",), {})
    assert str(done) == "instrumented one, two; not installed: absent"
    assert str(done) in caplog.text
    assert frameworks["absent"].tracers == []


def test_only_what_is_named_is_touched_and_it_records_with_the_given_tracer(frameworks: dict[str, Framework]) -> None:
    with StageTracer("r", enabled=False) as tracer:
        done = evalvault_sdk.instrument("two", tracer=tracer)
        assert frameworks["two"].tracers == [tracer]
    assert frameworks["one"].tracers == []
    assert str(done) == "instrumented two"


def test_all_of_it_is_undone_at_once(frameworks: dict[str, Framework]) -> None:
    with evalvault_sdk.instrument():
        assert frameworks["one"].undone == 0
    assert (frameworks["one"].undone, frameworks["two"].undone) == (1, 1)


def test_a_framework_of_a_version_nobody_has_seen_costs_the_others_nothing(
    frameworks: dict[str, Framework], caplog: pytest.LogCaptureFixture
) -> None:
    frameworks["one"].error = AttributeError("no dispatcher in this version")
    done = evalvault_sdk.instrument()
    assert (done.instrumented, dict(done.failed)) == (("two",), {"one": "AttributeError"})
    assert "one could not be instrumented (AttributeError)" in caplog.text
    assert "failed: one (AttributeError)" in str(done)


def test_a_name_that_is_none_is_an_error_that_lists_the_names(frameworks: dict[str, Framework]) -> None:
    with pytest.raises(ConfigurationError, match="'haystack': the frameworks are one, two, absent"):
        evalvault_sdk.instrument("one", "haystack")
    assert frameworks["one"].tracers == [], "nothing was done before it was noticed"


def test_what_is_named_and_not_installed_is_an_error_and_undoes_the_rest(frameworks: dict[str, Framework]) -> None:
    missing = ImportError("No module named 'no_such_package'", name="no_such_package")
    frameworks["absent"].error = MissingDependencyError.for_extra("tracing it", "absent", missing)
    with pytest.raises(MissingDependencyError, match=r"evalvault-sdk\[absent\]"):
        evalvault_sdk.instrument("one", "absent")
    assert frameworks["one"].undone == 1


def test_the_names_are_those_of_real_integrations() -> None:
    with StageTracer("r", enabled=False) as tracer, evalvault_sdk.instrument(tracer=tracer) as done:
        assert done.instrumented == ("langchain", "llama_index")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index", "llama-index"),
        ("opentelemetry", "opentelemetry", "otel"),
        ("prometheus", "prometheus_client", "prometheus"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, module: str, package: str, extra: str) -> None:
    said = said_without(package, f"import evalvault_sdk.integrations.{module}", tmp_path)
    assert f"pip install 'evalvault-sdk[{extra}]'" in said
