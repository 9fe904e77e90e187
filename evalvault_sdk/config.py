"""
Every option of the client, with its variable, unit and default.

In:   keyword arguments of `StageTracer`, and `EVALVAULT_*` environment variables.
Out:  one frozen `Settings`, or a `ConfigurationError` that says which value is wrong, from which variable
      if from any, and what it may be.

An argument wins over its variable, a variable over the default. Wrong settings raise at construction, the
only time at which this package raises: a typo must not be found out by looking for missing traces.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, get_args

import attrs

from evalvault_sdk import checks
from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.payload import PayloadStore

#: What can be found in texts and replaced (`capture.redact`).
PersonalData = Literal["email", "phone", "card", "resident_number", "passport", "account"]
PERSONAL_DATA: tuple[PersonalData, ...] = get_args(PersonalData)

_MEBIBYTE = 1 << 20
_T = TypeVar("_T")


def setting(
    env: str | None, help: str, *, read: Callable[[str], Any] = str, capture: bool = False, **options: Any
) -> Any:
    """Declare an option; `read` turns its variable's text into its value. Those of `capture` do not touch delivery."""
    return attrs.field(metadata={"env": env, "help": help, "read": read, "capture": capture}, **options)


def _kinds_of_personal_data(value: Any) -> Any:
    """Return the kinds meant: one name is one kind, `all` are all."""
    kinds = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, set, frozenset)) else value
    return PERSONAL_DATA if kinds == ("all",) else kinds


@attrs.frozen(kw_only=True)
class Settings:
    """Every option of the client. `Settings.resolve(...)` reads the environment too; this class does not."""

    run_id: str = setting(
        "EVALVAULT_RUN_ID",
        "What is analysed together: a deployment, an experiment, a day.",
        converter=checks.stripped,
        validator=checks.is_run_id,
    )
    api_url: str = setting(
        "EVALVAULT_API_URL",
        "Where the server is; `/api/stage/events` is added to it.",
        default="http://localhost:8000",
        converter=checks.without_slash,
        validator=checks.is_url,
    )
    file: str | None = setting(
        "EVALVAULT_FILE",
        "Instead of sending: append events to this JSONL file, to be carried by hand and ingested elsewhere.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    db_path: str | None = setting(
        "EVALVAULT_SDK_DB_PATH",
        "Instead of sending: store events in this database file, without a server.",
        default=None,
        converter=checks.as_path,
        validator=checks.is_path,
    )
    otlp_endpoint: str | None = setting(
        "EVALVAULT_OTLP_ENDPOINT",
        "Instead of sending to EvalVault: send events as spans to this OTLP endpoint (HTTP), a Collector for example; "
        "`/v1/traces` is added to it. Needs `evalvault-sdk[otel]`.",
        default=None,
        converter=checks.without_slash,
        validator=checks.is_url_or_none,
    )
    token: str | None = setting(
        "EVALVAULT_API_TOKEN",
        "Bearer token. Never shown in a repr or a log line.",
        default=None,
        converter=checks.stripped_or_none,
        validator=checks.is_token,
        repr=lambda value: "None" if value is None else "'***'",
    )
    enabled: bool = setting(
        "EVALVAULT_SDK_DISABLED",
        "`False` (the variable: `1`) makes everything a no-op: no thread, no network, no events.",
        default=True,
        read=checks.read_negated_flag,
        validator=checks.is_bool,
    )
    verify: bool | str = setting(
        "EVALVAULT_CA_BUNDLE",
        "As in `requests`: a file or folder of certificate authorities to trust.",
        default=True,
        converter=checks.as_path,
        validator=checks.is_verify,
    )
    cert: str | tuple[str, str] | None = setting(
        "EVALVAULT_CLIENT_CERT",
        "As in `requests`: a client certificate, one file or `(certificate, key)`.",
        default=None,
        validator=checks.is_cert,
    )
    proxies: Mapping[str, str] | None = setting(
        None,
        "As in `requests`; without it `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` are used.",
        default=None,
        validator=checks.is_text_mapping,
        repr=lambda value: "None" if value is None else "'***'",  # proxy addresses hold passwords
    )
    headers: Mapping[str, str] = setting(
        None,
        "Headers to add to every request, for gateways that want their own.",
        factory=dict,
        validator=checks.is_text_mapping,
        repr=lambda value: str(sorted(value)),  # names only
    )
    sample_rate: float = setting(
        "EVALVAULT_SAMPLE_RATE",
        "The part of all traces that is recorded, from 0 to 1; drawn by trace id, so that all services agree.",
        default=1.0,
        read=checks.read_number,
        validator=checks.is_rate,
        capture=True,
    )
    sample_keep_errors: bool = setting(
        "EVALVAULT_SAMPLE_KEEP_ERRORS",
        "Keep traces with a failed stage although they were not drawn.",
        default=True,
        read=checks.read_flag,
        validator=checks.is_bool,
        capture=True,
    )
    sample_keep_slow_ms: float | None = setting(
        "EVALVAULT_SAMPLE_KEEP_SLOW_MS",
        "Keep traces that take at least so many milliseconds although they were not drawn.",
        default=None,
        read=checks.read_number,
        validator=checks.is_milliseconds,
        capture=True,
    )
    content: Literal["all", "none"] = setting(
        "EVALVAULT_CONTENT",
        "`none` keeps ids, counts, scores and timings, but no text.",
        default="all",
        validator=checks.one_of("all", "none"),
        capture=True,
    )
    scrub_secrets: bool = setting(
        "EVALVAULT_SCRUB_SECRETS",
        "Replace passwords, tokens and API keys: by the names of their fields, and where their form is known.",
        default=True,
        read=checks.read_flag,
        validator=checks.is_bool,
        capture=True,
    )
    personal_data: tuple[PersonalData, ...] = setting(
        "EVALVAULT_PERSONAL_DATA",
        "Kinds of personal data to replace: `email`, `phone`, `card`, `resident_number`, `passport`, `account`; or "
        "`all`.",
        default=(),
        read=checks.read_names,
        converter=_kinds_of_personal_data,
        validator=checks.some_of(*PERSONAL_DATA),
        capture=True,
    )
    mask: Callable[[dict[str, Any]], dict[str, Any]] | None = setting(
        None,
        "Called with each event's content (`attributes`, `metadata`, `stage_type` ...), returns what may be sent "
        "of it. If it raises, nothing is.",
        default=None,
        validator=checks.is_callable,
        capture=True,
    )
    max_attribute_bytes: int = setting(
        "EVALVAULT_MAX_ATTRIBUTE_BYTES",
        "Bytes of JSON of one attribute; what is beyond is cut, and says so.",
        default=128 << 10,
        read=checks.read_whole_number,
        validator=checks.count(1024),
        capture=True,
    )
    max_event_bytes: int = setting(
        "EVALVAULT_MAX_EVENT_BYTES",
        "Bytes of JSON of one event; of a larger one the largest attributes are cut.",
        default=_MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(4096),
        capture=True,
    )
    max_depth: int = setting(
        "EVALVAULT_MAX_DEPTH",
        "Levels of nesting within an attribute.",
        default=32,
        read=checks.read_whole_number,
        validator=checks.count(1, 200),
        capture=True,
    )
    max_items: int = setting(
        "EVALVAULT_MAX_ITEMS",
        "Values within an attribute, at all levels together.",
        default=10_000,
        read=checks.read_whole_number,
        validator=checks.count(10),
        capture=True,
    )
    traceback_frames: int = setting(
        "EVALVAULT_TRACEBACK_FRAMES",
        "So many innermost frames of an error's traceback are recorded: file, line and function.",
        default=0,
        read=checks.read_whole_number,
        validator=checks.count(0, 1000),
        capture=True,
    )
    payload_store: PayloadStore | None = setting(
        None,
        "Where `stage.save_input()` and `stage.save_output()` keep what is too large for an event.",
        default=None,
        validator=checks.has_methods("put"),
        capture=True,
    )
    console: bool = setting(
        "EVALVAULT_CONSOLE",
        "Print stages on standard error as they end.",
        default=False,
        read=checks.read_flag,
        validator=checks.is_bool,
        capture=True,
    )
    compression: Literal["gzip", "zstd", "none"] = setting(
        "EVALVAULT_COMPRESSION",
        "How request bodies are packed: `gzip`, `zstd` (needs `evalvault-sdk[zstd]`) or `none`.",
        default="gzip",
        validator=checks.one_of("gzip", "zstd", "none"),
    )
    flush_interval_s: float = setting(
        "EVALVAULT_FLUSH_INTERVAL_S",
        "Seconds an event waits at most before it is sent.",
        default=1.0,
        read=checks.read_number,
        validator=checks.seconds(0.01),
    )
    batch_events: int = setting(
        "EVALVAULT_BATCH_EVENTS",
        "So many waiting events are sent at once, without waiting longer.",
        default=512,
        read=checks.read_whole_number,
        validator=checks.count(1),
    )
    max_batch_events: int = setting(
        "EVALVAULT_MAX_BATCH_EVENTS",
        "Events in one request at most, when there is a backlog.",
        default=8192,
        read=checks.read_whole_number,
        validator=checks.count(1),
    )
    max_batch_bytes: int = setting(
        "EVALVAULT_MAX_BATCH_BYTES",
        "Bytes of JSON in one request at most, before compression.",
        default=4 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1024),
    )
    durability: Literal["memory", "spool", "journal"] = setting(
        "EVALVAULT_DURABILITY",
        "What is put on disk: nothing (`memory`), what cannot be delivered (`spool`), or every event as it is "
        "recorded (`journal`).",
        default="spool",
        validator=checks.one_of("memory", "spool", "journal"),
    )
    spool_dir: str | None = setting(
        "EVALVAULT_SPOOL_DIR",
        "The folder for that; by default `~/.local/state/evalvault/spool`, or one in the folder for temporary files.",
        default=None,
        converter=checks.as_absolute_path,
        validator=checks.is_path,
    )
    spool_max_bytes: int = setting(
        "EVALVAULT_SPOOL_MAX_BYTES",
        "Bytes on disk at most, for each destination.",
        default=512 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1 << 16),
    )
    spool_max_age_s: float = setting(
        "EVALVAULT_SPOOL_MAX_AGE_S",
        "Seconds after which what is on disk is given up.",
        default=7 * 86_400.0,
        read=checks.read_number,
        validator=checks.seconds(60, 3650 * 86_400.0),
    )
    spool_policy: Literal["drop_oldest", "drop_newest"] = setting(
        "EVALVAULT_SPOOL_POLICY",
        "When that much is on disk: `drop_oldest` or `drop_newest`.",
        default="drop_oldest",
        validator=checks.one_of("drop_oldest", "drop_newest"),
    )
    max_queue_events: int = setting(
        "EVALVAULT_MAX_QUEUE_EVENTS",
        "Events of one tracer that wait in memory at most.",
        default=100_000,
        read=checks.read_whole_number,
        validator=checks.count(1),
    )
    max_queue_bytes: int = setting(
        "EVALVAULT_MAX_QUEUE_BYTES",
        "Bytes of JSON of one tracer that wait in memory at most.",
        default=64 * _MEBIBYTE,
        read=checks.read_whole_number,
        validator=checks.count(1024),
    )
    queue_policy: Literal["spool", "drop_oldest", "drop_newest", "block"] = setting(
        "EVALVAULT_QUEUE_POLICY",
        "When more comes: to disk (`spool`; with `memory` as `drop_newest`), `drop_oldest`, `drop_newest`, or let the "
        "program wait (`block`).",
        default="spool",
        validator=checks.one_of("spool", "drop_oldest", "drop_newest", "block"),
    )
    queue_block_timeout_s: float = setting(
        "EVALVAULT_QUEUE_BLOCK_TIMEOUT_S",
        "Seconds that `block` lets the program wait before the event is dropped.",
        default=1.0,
        read=checks.read_number,
        validator=checks.seconds(0),
    )
    connect_timeout_s: float = setting(
        "EVALVAULT_CONNECT_TIMEOUT_S",
        "Seconds to wait for a connection.",
        default=3.0,
        read=checks.read_number,
        validator=checks.seconds(0.01),
    )
    read_timeout_s: float = setting(
        "EVALVAULT_READ_TIMEOUT_S",
        "Seconds to wait for an answer, all of it.",
        default=10.0,
        read=checks.read_number,
        validator=checks.seconds(0.01),
    )
    retry_initial_s: float = setting(
        "EVALVAULT_RETRY_INITIAL_S",
        "Ceiling in seconds of the first wait after a failure; doubled each time, drawn at random below it.",
        default=0.5,
        read=checks.read_number,
        validator=checks.seconds(0.001),
    )
    retry_max_s: float = setting(
        "EVALVAULT_RETRY_MAX_S",
        "Ceiling in seconds of every later wait. A server's `Retry-After` may ask for more, up to 10 minutes.",
        default=30.0,
        read=checks.read_number,
        validator=checks.seconds(0.001),
    )
    shutdown_timeout_s: float = setting(
        "EVALVAULT_SHUTDOWN_TIMEOUT_S",
        "Seconds that `shutdown()` and the end of the process may take.",
        default=2.0,
        read=checks.read_number,
        validator=checks.seconds(0),
    )
    handle_sigterm: bool = setting(
        "EVALVAULT_HANDLE_SIGTERM",
        "`True`: on SIGTERM deliver first, or put on disk, what was recorded; then do what SIGTERM did before.",
        default=False,
        read=checks.read_flag,
        validator=checks.is_bool,
    )
    on_drop: Callable[[str, int], object] | None = setting(
        None,
        "Called with a reason and a number when events were lost. All callbacks run in a thread of the SDK.",
        default=None,
        validator=checks.is_callable,
    )
    on_error: Callable[[str], object] | None = setting(
        None,
        "Called with a sentence when a request failed, events were rejected, or the disk could not be written.",
        default=None,
        validator=checks.is_callable,
    )
    on_state_change: Callable[[str], object] | None = setting(
        None,
        'Called with `"outage"` when one begins, and with `"delivering"` when it ends.',
        default=None,
        validator=checks.is_callable,
    )

    @classmethod
    def resolve(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """
        Return the settings in force: `given`, then `environ` (`os.environ` by default), then defaults.

        An argument that is None counts as not given. What is disabled in either place is disabled. Raises
        `ConfigurationError`.
        """
        return construct(cls, *_collect(environ, given))

    @classmethod
    def sources(cls, environ: Mapping[str, str] | None = None, **given: Any) -> dict[str, str]:
        """
        Return where each setting in force comes from: `"argument"`, the name of a variable, or `"default"`.

        Takes what `resolve` takes. Raises `ConfigurationError` for a variable that cannot be read.
        """
        values, from_environ = _collect(environ, given)
        return {
            field.name: from_environ.get(field.name)
            or ("argument" if values.get(field.name) is not None else "default")
            for field in attrs.fields(cls)
        }


def construct(cls: type[_T], values: Mapping[str, Any], from_environ: Mapping[str, str]) -> _T:
    """Return `cls(**values)`; an error names the variable that the value at fault is from, if it is from one."""
    try:
        return cls(**values)
    except ConfigurationError as error:
        variable = from_environ.get(str(error).partition(" ")[0])
        if variable is None:
            raise
        raise ConfigurationError(f"{error} (from the variable {variable})") from None


def collect(
    cls: type[Any], environ: Mapping[str, str], given: Mapping[str, Any], *, but: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Return the values that are not defaults, and of those from variables the names of these.

    `given` wins over `environ`, whose variables for the settings in `but` are not read. Raises
    `ConfigurationError` for a name that is no setting, and for a variable that cannot be read.
    """
    fields = {field.name: field for field in attrs.fields(cls)}
    for name in given:
        if name not in fields:
            import difflib  # not for every program that imports us

            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(fields)}"
            raise ConfigurationError(f"there is no setting {name!r}{hint}")
    values = {name: value for name, value in given.items() if value is not None}
    from_environ: dict[str, str] = {}
    for name, field in fields.items():
        variable = field.metadata["env"]
        if variable is None or not environ.get(variable) or name in values or name in but:
            continue
        try:
            values[name] = field.metadata["read"](environ[variable])
        except ValueError as error:
            raise ConfigurationError(f"the variable {variable} {error}") from None
        from_environ[name] = variable
    return values, from_environ


def _collect(environ: Mapping[str, str] | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Collect the client's settings: events go to one place, and off is off wherever it is said."""
    environ = os.environ if environ is None else environ
    destinations = [name for name in _DESTINATIONS if given.get(name) is not None]
    if len(destinations) > 1:
        raise ConfigurationError(f"give one of {' and '.join(destinations)}: events go to one place")
    # A disabling variable is a switch for operators: it wins over what the code says, so both are looked at.
    enabled = given.get("enabled")
    without = {name: value for name, value in given.items() if name != "enabled"}
    # A place that the code names wins over one that a variable names.
    values, from_environ = collect(Settings, environ, without, but=_DESTINATIONS if destinations else ())
    if enabled is not None:
        values["enabled"] = values.get("enabled", True) and enabled
    from_variables = [from_environ[name] for name in _DESTINATIONS if name in from_environ]
    if len(from_variables) > 1:
        raise ConfigurationError(f"set one of {' and '.join(from_variables)}: events go to one place")
    # Its validator says what to do; a program that is switched off need not have one.
    values.setdefault("run_id", None if values.get("enabled", True) else "disabled")
    return values, from_environ


#: The settings that say where events go.
_DESTINATIONS = ("api_url", "file", "db_path", "otlp_endpoint")


class SettingArguments(TypedDict, total=False):
    """The settings as keyword arguments, so that type checkers know them; a test holds them against `Settings`."""

    file: str | os.PathLike[str] | None
    db_path: str | os.PathLike[str] | None
    otlp_endpoint: str | None
    token: str | None
    enabled: bool | None
    verify: bool | str | os.PathLike[str] | None
    cert: str | tuple[str, str] | None
    proxies: Mapping[str, str] | None
    headers: Mapping[str, str] | None
    sample_rate: float | None
    sample_keep_errors: bool | None
    sample_keep_slow_ms: float | None
    content: Literal["all", "none"] | None
    scrub_secrets: bool | None
    personal_data: Sequence[PersonalData | Literal["all"]] | PersonalData | Literal["all"] | None
    mask: Callable[[dict[str, Any]], dict[str, Any]] | None
    max_attribute_bytes: int | None
    max_event_bytes: int | None
    max_depth: int | None
    max_items: int | None
    traceback_frames: int | None
    payload_store: PayloadStore | None
    console: bool | None
    compression: Literal["gzip", "zstd", "none"] | None
    flush_interval_s: float | None
    batch_events: int | None
    max_batch_events: int | None
    max_batch_bytes: int | None
    durability: Literal["memory", "spool", "journal"] | None
    spool_dir: str | os.PathLike[str] | None
    spool_max_bytes: int | None
    spool_max_age_s: float | None
    spool_policy: Literal["drop_oldest", "drop_newest"] | None
    max_queue_events: int | None
    max_queue_bytes: int | None
    queue_policy: Literal["spool", "drop_oldest", "drop_newest", "block"] | None
    queue_block_timeout_s: float | None
    connect_timeout_s: float | None
    read_timeout_s: float | None
    retry_initial_s: float | None
    retry_max_s: float | None
    shutdown_timeout_s: float | None
    handle_sigterm: bool | None
    on_drop: Callable[[str, int], object] | None
    on_error: Callable[[str], object] | None
    on_state_change: Callable[[str], object] | None
