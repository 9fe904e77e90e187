"""
Every option of the server, with its variable, unit and default.

In:   keyword arguments of `create_app`, options of `evalvault-sdk serve`, `EVALVAULT_SERVER_*` variables.
Out:  one frozen `ServerSettings`, or a `ConfigurationError` that says which value is wrong, and what it may be.

An argument wins over its variable, a variable over the default. It is plain data, so that it can be handed
to worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from evalvault_sdk import checks
from evalvault_sdk.config import collect, construct, setting
from evalvault_sdk.errors import ConfigurationError

_MEBIBYTE = 1 << 20


def _split_tokens(text: str) -> tuple[str, ...]:
    """Return the tokens in a variable; a blank one is an accident that must not let everybody in."""
    return checks.read_names(text) or (text,)


def _are_tokens(_instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(token, str) and token.strip() for token in value):
        raise ConfigurationError(
            f"{attribute.name} is empty: give one, or none at all, which lets everybody in (is a variable not set?)"
        )
    for token in value:
        checks.is_token(None, attribute, token)
        if "," in token:
            raise ConfigurationError(f"{attribute.name} must have no comma: it separates tokens in the variable")


def _are_texts(_instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) and text for text in value):
        raise ConfigurationError(f"{attribute.name} must be a list of texts")


def _tuple(value: Any) -> Any:
    """Return the texts meant: one text is one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, set)) else value


def _as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(int(value)) if isinstance(value, bool) else str(value)


@attrs.frozen(kw_only=True)
class ServerSettings:
    """Every option of the server. `ServerSettings.resolve(...)` reads the environment too; this class does not."""

    db: str = setting(
        "EVALVAULT_SERVER_DB",
        "Where events are kept: a file (made if it is not there), or `postgresql://...`.",
        default="evalvault.db",
        converter=checks.as_path,
        validator=checks.is_path,
        repr=lambda value: "'***'" if "://" in value else repr(value),
    )
    host: str = setting("EVALVAULT_SERVER_HOST", "The address to listen on.", default="127.0.0.1")
    port: int = setting(
        "EVALVAULT_SERVER_PORT",
        "The port to listen on.",
        default=8000,
        read=checks.read_whole_number,
        validator=checks.count(0, 65535),
    )
    workers: int = setting(
        "EVALVAULT_SERVER_WORKERS",
        "Processes that serve side by side; more than one needs PostgreSQL.",
        default=1,
        read=checks.read_whole_number,
        validator=checks.count(1, 1024),
    )
    token: tuple[str, ...] = setting(
        "EVALVAULT_API_TOKEN",
        "The token that every request must bear; several are separated by commas.",
        default=(),
        read=_split_tokens,
        converter=_tuple,
        validator=_are_tokens,
        repr=lambda value: "()" if not value else "'***'",
    )
    tokens_file: str | None = setting(
        "EVALVAULT_SERVER_TOKENS_FILE",
        "A TOML or YAML file of hashed tokens, each with what it may read and write (`evalvault-sdk token`).",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    insecure: bool = setting(
        "EVALVAULT_SERVER_INSECURE",
        "Listen without a token beyond this machine, and under any name: something in front checks access.",
        default=False,
        read=checks.read_flag,
        validator=checks.is_bool,
    )
    tls_cert: str | None = setting(
        "EVALVAULT_SERVER_TLS_CERT",
        "The certificate to serve HTTPS with: a PEM file, its chain included.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    tls_key: str | None = setting(
        "EVALVAULT_SERVER_TLS_KEY",
        "Its key, where that is another file.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    thresholds: str | None = setting(
        "EVALVAULT_SERVER_THRESHOLDS",
        "A JSON file of thresholds of metrics, in EvalVault's form: `default`, and `profiles`.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    profile: str | None = setting(
        "EVALVAULT_SERVER_PROFILE",
        "The profile of thresholds that holds: `dev`, `prod`, or one of that file's.",
        default=None,
    )
    relevance: str | None = setting(
        "EVALVAULT_SERVER_RELEVANCE",
        "A JSON file of the relevant documents of each test case: `{test_case_id: [doc_id, ...]}`.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    rules: str | None = setting(
        "EVALVAULT_SERVER_RULES",
        "A TOML or YAML file of metrics of your own.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    max_body_bytes: int = setting(
        "EVALVAULT_SERVER_MAX_BODY_BYTES",
        "Bytes of a request on the wire.",
        default=16 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1024),
    )
    max_unpacked_bytes: int = setting(
        "EVALVAULT_SERVER_MAX_UNPACKED_BYTES",
        "Bytes of a request after unpacking: a gzip bomb of 16 MiB would be 16 GiB.",
        default=32 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1024),
    )
    max_containers: int = setting(
        "EVALVAULT_SERVER_MAX_CONTAINERS",
        "Objects and lists in a request: an empty one is two bytes on the wire, and some ninety once it is parsed.",
        default=500_000,
        read=checks.read_whole_number,
        validator=checks.count(1000),
    )
    max_events: int = setting(
        "EVALVAULT_SERVER_MAX_EVENTS",
        "Events in a request.",
        default=10_000,
        read=checks.read_whole_number,
        validator=checks.count(1),
    )
    max_waiting_bytes: int = setting(
        "EVALVAULT_SERVER_MAX_WAITING_BYTES",
        "Bytes of all requests that are being read, parsed or stored; more are told to come again (503).",
        default=256 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1 << 20),
    )
    max_waiting_requests: int = setting(
        "EVALVAULT_SERVER_MAX_WAITING_REQUESTS",
        "Requests whose body is being read, parsed or stored at once.",
        default=256,
        read=checks.read_whole_number,
        validator=checks.count(1),
    )
    body_timeout_s: float = setting(
        "EVALVAULT_SERVER_BODY_TIMEOUT_S",
        "Seconds that a request may take to arrive.",
        default=30.0,
        read=checks.read_number,
        validator=checks.seconds(0.1),
    )
    store_timeout_s: float = setting(
        "EVALVAULT_SERVER_STORE_TIMEOUT_S",
        "Seconds that storing may take before the client is told to come again.",
        default=30.0,
        read=checks.read_number,
        validator=checks.seconds(0.1),
    )
    rate_limit: float | None = setting(
        "EVALVAULT_SERVER_RATE_LIMIT",
        "Requests a second of each token (without tokens: of each address), per process; bursts of ten seconds' worth.",
        default=None,
        read=checks.read_number,
        validator=checks.number_or_none(0.01, 1e6),
    )
    trusted_proxies: tuple[str, ...] = setting(
        "EVALVAULT_SERVER_TRUSTED_PROXIES",
        "Addresses of proxies in front, whose `X-Forwarded-For` says who asks; by default nobody's.",
        default=(),
        read=checks.read_names,
        converter=_tuple,
        validator=_are_texts,
    )
    max_live_streams: int = setting(
        "EVALVAULT_SERVER_MAX_LIVE_STREAMS",
        "Live streams at once.",
        default=100,
        read=checks.read_whole_number,
        validator=checks.count(0),
    )
    retain_days: float | None = setting(
        "EVALVAULT_SERVER_RETAIN_DAYS",
        "Days after which an event is deleted, by the time it ended; looked for every ten minutes. By default never.",
        default=None,
        read=checks.read_number,
        validator=checks.number_or_none(0.001, 36_500),
    )
    retain_run_events: int | None = setting(
        "EVALVAULT_SERVER_RETAIN_RUN_EVENTS",
        "Events of a run that are kept, the newest; looked for every ten minutes. By default all.",
        default=None,
        read=checks.read_whole_number,
        validator=attrs.validators.optional(checks.count(1)),
    )
    cors_origins: tuple[str, ...] = setting(
        "EVALVAULT_SERVER_CORS_ORIGINS",
        "Origins of web pages that may ask this server, `https://dash.example` say; by default none.",
        default=(),
        read=checks.read_names,
        converter=_tuple,
        validator=_are_texts,
    )
    log_format: Literal["text", "json"] = setting(
        "EVALVAULT_SERVER_LOG_FORMAT",
        "Lines of the log for people (`text`) or programs (`json`).",
        default="text",
        validator=checks.one_of("text", "json"),
    )
    log_requests: bool = setting(
        "EVALVAULT_SERVER_LOG_REQUESTS",
        "A line for every request; by default only for those that fail.",
        default=False,
        read=checks.read_flag,
        validator=checks.is_bool,
    )

    def as_variables(self) -> dict[str, str]:
        """Return the environment in which `resolve` finds these settings: for processes to come."""
        return {
            field.metadata["env"]: _as_text(value)
            for field in attrs.fields(type(self))
            if (value := getattr(self, field.name)) is not None
        }

    @classmethod
    def resolve(cls, environ: Mapping[str, str] | None = None, **given: Any) -> ServerSettings:
        """
        Return the settings in force: `given`, then `environ` (`os.environ` by default), then defaults.

        An argument that is None counts as not given. Raises `ConfigurationError`.
        """
        return construct(cls, *collect(cls, os.environ if environ is None else environ, given))
