"""
Post batches to `/api/stage/events`.

In:   a `Batch`, in the worker's thread.
Out:  its outcome, read from the status and from the server's verdict on each event.

One keep-alive session. `requests` is imported when the first batch is sent: its import is not for a program's
start to pay. Redirects are not followed: a POST that turns into a GET, or a login page with status 200, would
look like a delivery.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import orjson

from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import (
    Delivered,
    Outcome,
    Refused,
    RejectedEvent,
    RetryLater,
    TooLarge,
)
from evalvault_sdk.delivery.transport.pack import Packer
from evalvault_sdk.late import load

if TYPE_CHECKING:
    import requests

    from evalvault_sdk.config import Settings

EVENTS_PATH = "/api/stage/events"
#: Where OTLP is taken (`delivery.transport.otlp`).
TRACES_PATH = "/v1/traces"
#: What is read of an answer at most: verdicts on some thousands of events fit well.
_MAX_ANSWER_BYTES = 8 << 20
#: What a server may ask us to wait at most, in seconds.
_MAX_RETRY_AFTER_S = 600.0
#: RFC 9110, 15.5 and RFC 8470: not now, perhaps later. With them every 5xx.
_RETRYABLE = frozenset({408, 425, 429})
_ADVICE = {
    401: "the server wants a token: set EVALVAULT_API_TOKEN",
    403: "the token may not write to this run: check EVALVAULT_API_TOKEN and its scope",
    404: "there is no {server} at this address: check {variable}",
    405: "there is no {server} at this address: check {variable}",
    415: "the server does not take what we send: set EVALVAULT_COMPRESSION=gzip or none, or check {variable}",
    407: "the proxy wants a password: check HTTPS_PROXY",
}


@attrs.frozen
class Answer:
    """What a server said to a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Poster:
    """A session with one server."""

    def __init__(self, settings: Settings, url: str, content_type: str) -> None:
        self._settings = settings
        self._url = url
        self._content_type = content_type
        self._pack = Packer(settings.compression)
        self._session: requests.Session | None = None

    def post(self, body: bytes, *, timeout_s: float | None = None) -> Answer | RetryLater:
        """Post a body once; `timeout_s` shortens the timeouts of the settings. Without an answer, say why."""
        # The two in the middle requests itself imports late.
        load("requests", "netrc", "encodings.idna", "evalvault_sdk.delivery.transport.deadline")
        import requests

        body, packed = self._pack(body)
        headers = {"Content-Type": self._content_type, "Accept": self._content_type, **packed}
        try:
            if self._session is None:
                self._session = self._open()
            with self._session.post(
                self._url,
                data=body,
                headers=headers,
                timeout=self._timeouts(timeout_s),
                stream=True,
                **request_options(self._settings),
            ) as response:
                return Answer(response.status_code, response.headers, _read(response))
        except (requests.RequestException, OSError) as error:
            # OSError: a CA bundle that is not there, a socket that broke while the answer was read.
            self.close()
            return RetryLater(_describe(error), advice=_advice_for(error))

    def _open(self) -> requests.Session:
        from evalvault_sdk.delivery.transport.deadline import DeadlineAdapter

        session = open_session(self._settings)
        for scheme in ("https://", "http://"):
            session.mount(scheme, DeadlineAdapter())
        return session

    def _timeouts(self, most_s: float | None) -> tuple[float, float]:
        connect_s, read_s = self._settings.connect_timeout_s, self._settings.read_timeout_s
        if most_s is None:
            return connect_s, read_s
        most_s = max(most_s, 0.001)  # 0 would mean "do not wait at all", which requests refuses
        return min(connect_s, most_s), min(read_s, most_s)

    def close(self) -> None:
        """Close the connection; the next `post` opens one."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def after_fork_in_child(self) -> None:
        """Close this process's copy of the parent's connection, whose locks nobody will release."""
        session, self._session = self._session, None
        if session is not None:
            try:
                _renew_locks(session)
                session.close()
            except Exception:  # noqa: BLE001 - another urllib3 than those we know: then it stays open
                _inherited.append(session)


class HttpTransport:
    """The endpoint for events of one server."""

    def __init__(self, settings: Settings) -> None:
        url = settings.api_url
        self.destination = url if url.endswith(EVENTS_PATH) else url + EVENTS_PATH
        self._poster = Poster(settings, self.destination, "application/json")

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Post the batch once."""
        answer = self._poster.post(batch.body(), timeout_s=timeout_s)
        if isinstance(answer, RetryLater):
            return answer
        return outcome_of(answer.status, answer.headers, answer.body, len(batch))

    def close(self) -> None:
        """Close the connection; the next `send` opens one."""
        self._poster.close()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's connection."""
        self._poster.after_fork_in_child()


def open_session(settings: Settings) -> requests.Session:
    """Return a session that names and identifies itself to the server of `settings`."""
    import requests

    from evalvault_sdk import __version__

    session = requests.Session()
    session.headers.update({"User-Agent": f"evalvault-sdk/{__version__}", "Accept": "application/json"})
    session.headers.update(settings.headers)
    if settings.token is not None:
        # As `auth`, not as a header: requests lets a matching ~/.netrc entry overwrite the header.
        session.auth = _bearer(settings.token)
    return session


def request_options(settings: Settings) -> dict[str, Any]:
    """Return what each request needs said: in requests, what a session holds of these gives way to the environment."""
    return {
        "verify": settings.verify,
        "cert": settings.cert,
        "proxies": None if settings.proxies is None else dict(settings.proxies),
        "allow_redirects": False,
    }


#: Sessions of a parent that could not be closed: collecting them would wait for their locks.
_inherited: list[requests.Session] = []


def _renew_locks(session: requests.Session) -> None:
    """Make new in place the locks in urllib3's pools, as the standard library does with its own after a fork."""
    for adapter in session.adapters.values():
        for manager in (adapter.poolmanager, *adapter.proxy_manager.values()):  # type: ignore[attr-defined]
            manager.pools.lock._at_fork_reinit()
            for key in manager.pools.keys():  # noqa: SIM118 - urllib3's container refuses to be iterated
                manager.pools[key].pool.mutex._at_fork_reinit()


def _bearer(token: str) -> Any:
    def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorize


def _read(response: requests.Response) -> bytes:
    """Return the answer's body, cut at what we are ready to hold."""
    chunks, size = [], 0
    for chunk in response.iter_content(64 << 10):
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_ANSWER_BYTES:
            break
    return b"".join(chunks)


def outcome_of(status: int, headers: Mapping[str, str], answer: bytes, sent: int) -> Outcome:
    """Return what the server's answer to a batch of `sent` events means (contract: "HTTP, as the plan has it")."""
    if 200 <= status < 300:
        verdict = _verdict(answer, sent)
        if verdict is None:
            return RetryLater(
                f"HTTP {status} from something that is not EvalVault",
                advice="check EVALVAULT_API_URL, and whether a proxy or a login page answers instead",
            )
        return verdict
    if status == 413:
        limit = _object(answer).get("limit_bytes")
        return TooLarge(limit if isinstance(limit, int) and limit > 0 else None)
    trouble = trouble_of(status, headers, "EvalVault server", "EVALVAULT_API_URL")
    if trouble is not None:
        return trouble
    if status == 422:
        verdict = _verdict(answer, sent)
        if verdict is not None:
            return verdict
    problem = _object(answer)
    if not (isinstance(problem.get("error"), str) and isinstance(problem.get("details"), str)):
        return RetryLater(
            f"HTTP {status} from something that is not EvalVault",
            advice="check EVALVAULT_API_URL, and whether a proxy answers instead",
            blame="request",
        )
    return Refused(f"{problem['error']}: {problem['details']}")


def trouble_of(status: int, headers: Mapping[str, str], server: str, variable: str) -> RetryLater | None:
    """Return what any HTTP server means by a status that may pass, or that a person can do something about."""
    if status in _RETRYABLE or status >= 500:
        wait_s = retry_after_s(headers.get("Retry-After"), time.time())
        return RetryLater(f"HTTP {status}", wait_s=wait_s, blame="unclear" if status == 500 else "destination")
    if 300 <= status < 400:
        return RetryLater(
            f"HTTP {status}, a redirect",
            advice=f"check {variable} (https instead of http? another path?): redirects are not followed",
        )
    if status in _ADVICE:
        return RetryLater(
            f"HTTP {status}",
            advice=_ADVICE[status].format(server=server, variable=variable),
            blame="destination" if status in (401, 407) else "request",
        )
    return None


def _verdict(answer: bytes, sent: int) -> Delivered | None:
    """Read the server's verdict on each event; None if this is no answer of EvalVault to `sent` events."""
    verdict = _object(answer)
    stored, rejected = verdict.get("stored", 0), verdict.get("rejected") or []
    if not isinstance(stored, int) or not isinstance(rejected, list) or not ("stored" in verdict or rejected):
        return None
    by_index: dict[int, RejectedEvent] = {}
    for entry in rejected:
        index = entry.get("index") if isinstance(entry, dict) else None
        if not isinstance(index, int) or not 0 <= index < sent:
            return None
        by_index[index] = RejectedEvent(index, str(entry.get("details") or entry.get("error") or "refused"))
    if stored + len(by_index) != sent:
        return None
    return Delivered(tuple(by_index[index] for index in sorted(by_index)))


def _object(answer: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def retry_after_s(value: str | None, now: float) -> float | None:
    """
    Return the seconds that a `Retry-After` header asks for, in either of its forms (RFC 9110, 10.2.3).

    `now` is Unix time. None where the header is missing or unreadable; at most ten minutes.
    """
    if not value:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value)
    else:
        import email.utils  # loads much, as requests does: not before something is sent

        try:
            when = email.utils.parsedate_to_datetime(value)
            if when.tzinfo is None:  # asctime's form has no zone: RFC 9110, 5.6.7 says UTC
                when = when.replace(tzinfo=datetime.timezone.utc)
            seconds = when.timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)


def _describe(error: BaseException) -> str:
    """Return the kind of a network error and its cause; never its text, which holds the whole URL."""
    names = [type(error).__name__]
    cause = error.__cause__ or error.__context__
    while cause is not None and len(names) < 3:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return " from ".join(dict.fromkeys(names))


def _advice_for(error: BaseException) -> str | None:
    import requests

    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted: set EVALVAULT_CA_BUNDLE to your CA's file"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy could not be used: check HTTPS_PROXY and NO_PROXY"
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return "check EVALVAULT_CA_BUNDLE and EVALVAULT_CLIENT_CERT: a file may be missing"
    return None
