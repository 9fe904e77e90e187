"""The server's options: from arguments, from variables, and handed on to workers."""

from __future__ import annotations

import inspect
import re

import attrs
import pytest

from evalvault_sdk import ConfigurationError
from evalvault_sdk.cli.app import serve
from evalvault_sdk.server import ServerSettings
from evalvault_sdk.server.app import create_app
from evalvault_sdk.server.mounting import mount


def test_an_argument_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    environ = {"EVALVAULT_SERVER_DB": "env.db", "EVALVAULT_SERVER_PORT": "9000"}
    settings = ServerSettings.resolve(environ, db="given.db", port=None)
    assert (settings.db, settings.port, settings.host) == ("given.db", 9000, "127.0.0.1")


def test_settings_survive_the_way_through_variables_to_a_worker() -> None:
    settings = ServerSettings(
        db="postgresql://u:p@h/d",
        workers=3,
        token=("one", "two"),
        insecure=True,
        tls_cert="cert.pem",
        rate_limit=2.5,
        retain_days=30,
        retain_run_events=1000,
        cors_origins=("https://a", "https://b"),
        log_format="json",
        log_requests=True,
    )
    assert ServerSettings.resolve(settings.as_variables()) == settings
    assert ServerSettings.resolve(ServerSettings().as_variables()) == ServerSettings()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": 70_000}, "port must be a whole number from 0 to 65535"),
        ({"token": " "}, "token is empty"),
        ({"token": ["good", "a,b"]}, "token must have no comma"),
        ({"token": "한글"}, "ASCII"),
        ({"rate_limit": 0}, "rate_limit must be a number"),
        ({"retain_run_events": 0}, "retain_run_events"),
        ({"log_format": "xml"}, "log_format must be one of: text, json"),
        ({"cors_origins": [""]}, "cors_origins"),
        ({"prot": 1}, "did you mean 'port'"),
    ],
)
def test_a_wrong_setting_says_what_it_may_be(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        ServerSettings.resolve({}, **given)


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigurationError, match="EVALVAULT_SERVER_WORKERS"):
        ServerSettings.resolve({"EVALVAULT_SERVER_WORKERS": "many"})
    with pytest.raises(ConfigurationError, match=r"token is empty.*from the variable EVALVAULT_API_TOKEN"):
        ServerSettings.resolve({"EVALVAULT_API_TOKEN": " "})


def test_no_secret_is_in_the_repr() -> None:
    shown = repr(ServerSettings(token=("secret-token",), db="postgresql://user:secret-word@host/db"))
    assert "secret" not in shown


def test_every_option_of_the_command_is_a_setting() -> None:
    options = set(inspect.signature(serve).parameters) - {"cors_origin"}
    assert options <= {field.name for field in attrs.fields(ServerSettings)}


def test_an_app_of_its_own_reads_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVALVAULT_SERVER_DB", "memory:")
    monkeypatch.setenv("EVALVAULT_SERVER_MAX_EVENTS", "7")
    assert create_app().state.evalvault.settings.max_events == 7


def test_mounting_where_nothing_checks_who_asks_is_refused() -> None:
    from fastapi import FastAPI

    with pytest.raises(ConfigurationError, match="nothing would check who asks"):
        mount(FastAPI(), db="memory:")
    with pytest.raises(ConfigurationError, match="give db="):
        mount(FastAPI(), token="t")
    mount(FastAPI(), db="memory:", token="t")
    mount(FastAPI(), db="memory:", insecure=True)
