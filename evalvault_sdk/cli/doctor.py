"""
Find out why events do not arrive: from the settings in force, over the network, to the disk.

In:   the settings, as the SDK resolves them here.
Out:  where each setting comes from; then finding after finding, each with what to do.

Nothing is stored anywhere: the server is sent a batch without events, and what is made on disk is removed again.
Neither tokens, nor values of headers, nor passwords of proxies are part of any finding.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import attrs
import orjson
import requests
import requests.adapters
import requests.utils
from urllib3.util.ssl_ import create_urllib3_context

from evalvault_sdk.capture import stage
from evalvault_sdk.cli.spool import Destination
from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.folder import DESTINATION_FILE, default_root, folder_of, make_folder
from evalvault_sdk.delivery.lock import take_lock
from evalvault_sdk.delivery.outbox import transport_for
from evalvault_sdk.delivery.transport.base import Delivered, RetryLater, TooLarge
from evalvault_sdk.delivery.transport.deadline import DeadlineAdapter
from evalvault_sdk.delivery.transport.http import EVENTS_PATH, HttpTransport, open_session, outcome_of, request_options
from evalvault_sdk.errors import EvalVaultError, MissingDependencyError
from evalvault_sdk.server.store import open_store

#: Seconds that looking up a name may take; the system's own limit can be minutes.
_DNS_TIMEOUT_S = 5.0
#: A certificate that expires within so many days wants attention.
_EXPIRES_SOON_DAYS = 14
#: A clock that is off by more seconds than this puts stages of two machines in the wrong order.
_MAX_CLOCK_DIFFERENCE_S = 5.0
#: What is read of an answer.
_MAX_ANSWER_BYTES = 64 << 10
#: What OpenSSL calls a certificate that is out of its time, or of another name or address.
_EXPIRED, _NOT_YET_VALID, _OTHER_NAMES = 10, 9, (62, 64)


@attrs.frozen
class Finding:
    """What one check found."""

    what: str
    state: Literal["ok", "warning", "problem"]
    text: str
    #: What to do, if anything.
    advice: str = ""


@attrs.frozen
class Setting:
    """A setting in force, as it may be shown."""

    name: str
    value: str
    source: str


def resolve(environ: Mapping[str, str], **given: Any) -> tuple[Settings, list[Setting]]:
    """Return the settings in force, and those that can be set from outside for people. Raises `ConfigurationError`."""
    if not environ.get("EVALVAULT_RUN_ID"):
        given["run_id"] = "doctor"  # programs mostly name it themselves
    settings = Settings.resolve(environ, **given)
    sources = Settings.sources(environ, **given)
    shown = []
    for field in attrs.fields(Settings):
        if field.name == "run_id" and "run_id" in given:
            shown.append(Setting("run_id", "-", "each program names it"))
        elif field.metadata["env"]:
            value = getattr(settings, field.name)
            text = field.repr(value) if callable(field.repr) else repr(value)
            shown.append(Setting(field.name, text, sources[field.name]))
    return settings, shown


def examine(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check one thing after the other; what depends on a thing that does not work is left out."""
    if settings.enabled:
        yield Finding("settings", "ok", "valid")
    else:
        yield Finding("settings", "warning", "recording is switched off", "unset EVALVAULT_SDK_DISABLED to record")
    if Path(stage.__file__).suffix == ".py":
        yield Finding("recording", "ok", "not compiled here: recording a stage takes twice the time")
    else:
        yield Finding("recording", "ok", "compiled")
    destination = settings.file or settings.db_path
    if destination is not None:
        yield from _file(settings, destination)
    else:
        try:
            destination = transport_for(settings).destination
        except MissingDependencyError as error:
            yield Finding("server", "problem", "spans cannot be sent", str(error))
            return
        with open_session(settings) as session:
            yield from _network(settings, session, environ)
    if settings.durability == "memory":
        yield Finding("spool", "ok", "not used: durability is memory")
    else:
        yield from _spool(settings, Path(settings.spool_dir or default_root(environ)), destination)


# -- network ----------------------------------------------------------------------------------------


def _network(settings: Settings, session: requests.Session, environ: Mapping[str, str]) -> Iterator[Finding]:
    address = settings.otlp_endpoint or settings.api_url
    url = urlsplit(address)
    options = session.merge_environment_settings(
        address, dict(settings.proxies or {}), None, settings.verify, settings.cert
    )
    proxy_url = requests.utils.select_proxy(address, options["proxies"])
    proxy = urlsplit(proxy_url if "://" in proxy_url else f"http://{proxy_url}") if proxy_url else None
    if proxy is None:
        yield Finding("proxy", "ok", "none")
    elif not proxy.hostname:
        yield Finding("proxy", "problem", "its address cannot be read", "check HTTPS_PROXY and HTTP_PROXY")
        return
    else:
        named = [name for name in sorted(environ) if name.lower().endswith("_proxy") and environ[name] == proxy_url]
        source = f", from {' and '.join(named)}" if named else ""
        yield Finding("proxy", "ok", f"{proxy.scheme}://{_place(proxy)}{source}")

    near = proxy or url
    addresses, finding = _look_up(near)
    yield finding
    if not addresses:
        return
    finding = _connect(near, settings.connect_timeout_s)
    yield finding
    if finding.state == "problem":
        return
    if url.scheme == "https" and (proxy is None or proxy.scheme == "http"):
        finding = _tls(settings, url, proxy, proxy_url, options["verify"] or settings.verify)
    elif url.scheme == "https":
        finding = Finding("TLS", "ok", "through the proxy: see the server")
    elif settings.token is not None and not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        finding = Finding("TLS", "warning", "none: the token travels in the clear", "use an https:// address")
    else:
        finding = Finding("TLS", "ok", "none: an http:// address")
    yield finding
    if finding.state == "problem":
        return
    if settings.otlp_endpoint is None:
        yield from _server(settings, session)
    else:
        yield _otlp_endpoint(settings)


def _place(url: SplitResult) -> str:
    """Return host and port, and nothing of the credentials before them."""
    host = url.hostname or ""
    return f"{f'[{host}]' if ':' in host else host}:{_port(url)}"


def _port(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _look_up(url: SplitResult) -> tuple[list[str], Finding]:
    found: list[str] = []
    problems: list[str] = []

    def look_up() -> None:
        try:
            infos = socket.getaddrinfo(url.hostname, _port(url), type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(info[4][0]).partition("%")[0] for info in infos))
        except (OSError, UnicodeError) as error:
            problems.append(getattr(error, "strerror", None) or type(error).__name__)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_DNS_TIMEOUT_S)
    if found:
        return found, Finding("name", "ok", f"{url.hostname} is {', '.join(found)}")
    problem = problems[0] if problems else f"no answer within {_DNS_TIMEOUT_S:g} s"
    advice = "check the name in EVALVAULT_API_URL (or of the proxy), and this machine's DNS"
    return [], Finding("name", "problem", f"{url.hostname} is not known: {problem}", advice)


def _connect(url: SplitResult, timeout_s: float) -> Finding:
    try:
        socket.create_connection((url.hostname or "", _port(url)), timeout_s).close()
    except OSError as error:
        advice = "check whether it runs there, and whether a firewall lets this machine through"
        return Finding("connection", "problem", f"{_place(url)}: {error.strerror or error}", advice)
    return Finding("connection", "ok", f"{_place(url)} takes connections")


def _tls(
    settings: Settings, url: SplitResult, proxy: SplitResult | None, proxy_url: str | None, verify: bool | str
) -> Finding:
    """Shake hands as the SDK does, through the proxy if there is one."""
    context = create_urllib3_context()
    authorities = requests.utils.DEFAULT_CA_BUNDLE_PATH if verify is True else verify
    try:
        if authorities is False:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            context.check_hostname, context.verify_mode = True, ssl.CERT_REQUIRED
            path = Path(str(authorities))
            context.load_verify_locations(**{"capath" if path.is_dir() else "cafile": str(path)})
        if settings.cert is not None:
            context.load_cert_chain(*([settings.cert] if isinstance(settings.cert, str) else settings.cert))
    except OSError as error:
        text = f"a certificate file cannot be used: {error.strerror or error}"
        return Finding("TLS", "problem", text, "check EVALVAULT_CA_BUNDLE and EVALVAULT_CLIENT_CERT")
    near = proxy or url
    connection = http.client.HTTPSConnection(
        near.hostname or "", _port(near), timeout=settings.connect_timeout_s, context=context
    )
    if proxy_url is not None:
        headers = requests.adapters.HTTPAdapter().proxy_headers(proxy_url)
        connection.set_tunnel(url.hostname or "", _port(url), headers)
    try:
        connection.connect()
        handshake: ssl.SSLSocket = connection.sock
        version, certificate = handshake.version(), handshake.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return Finding("TLS", "problem", f"the certificate: {error.verify_message}", _certificate_advice(error, url))
    except ssl.SSLError as error:
        advice = "check the address: is it http:// perhaps, or does the server want a client certificate?"
        return Finding("TLS", "problem", f"no handshake: {error.reason or error.strerror}", advice)
    except OSError as error:
        text = f"no handshake: {error.strerror or type(error).__name__}"
        return Finding("TLS", "problem", text, "check HTTPS_PROXY and NO_PROXY" if proxy else "check the address")
    finally:
        connection.close()
    if authorities is False:
        return Finding("TLS", "warning", f"{version}, but the certificate is not checked", "name your CA's file")
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86_400
    text = f"{version}, certificate trusted for {url.hostname}, expires in {days:.0f} days"
    if days < _EXPIRES_SOON_DAYS:
        return Finding("TLS", "warning", text, "have the server's certificate renewed")
    return Finding("TLS", "ok", text)


def _certificate_advice(error: ssl.SSLCertVerificationError, url: SplitResult) -> str:
    if error.verify_code in _OTHER_NAMES:
        return f"it is for another name: check EVALVAULT_API_URL, or have it name {url.hostname}"
    if error.verify_code == _EXPIRED:
        return "have the server's certificate renewed, and check this machine's clock"
    if error.verify_code == _NOT_YET_VALID:
        return "check this machine's clock"
    return "set EVALVAULT_CA_BUNDLE to your CA's file"


@attrs.frozen
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    #: Unix time when it came, and how long it took.
    at: float
    took_s: float


def _ask(settings: Settings, session: requests.Session, url: str, body: bytes | None = None) -> _Answer:
    began = time.monotonic()
    with session.request(
        "GET" if body is None else "POST",
        url,
        data=body,
        headers={"Content-Type": "application/json"},
        timeout=(settings.connect_timeout_s, settings.read_timeout_s),
        stream=True,
        **request_options(settings),
    ) as response:
        answer = next(response.iter_content(_MAX_ANSWER_BYTES), b"")
        return _Answer(response.status_code, response.headers, answer, time.time(), time.monotonic() - began)


def _server(settings: Settings, session: requests.Session) -> Iterator[Finding]:
    for scheme in ("https://", "http://"):
        session.mount(scheme, DeadlineAdapter())
    url = HttpTransport(settings).destination
    nothing = Batch(()).body()  # judged like any other, and refused for being empty
    try:
        health = _ask(settings, session, url.removesuffix(EVENTS_PATH) + "/health")
        answer = _ask(settings, session, url, nothing)
        again = _ask(settings, session, url, nothing)  # over the connection that is there now
    except (requests.RequestException, OSError) as error:
        text = f"no answer ({type(error).__name__})"
        advice = "check EVALVAULT_API_URL" + (
            ", HTTPS_PROXY and NO_PROXY" if isinstance(error, requests.exceptions.ProxyError) else ""
        )
        yield Finding("server", "problem", text, advice)
        return
    version = _version(health)
    outcome = outcome_of(answer.status, answer.headers, answer.body, 0)
    wants_token = answer.status in (401, 403)
    if isinstance(outcome, RetryLater) and not wants_token:
        yield Finding("server", "problem", outcome.reason, outcome.advice or "try later")
        return
    if version is not None:
        yield Finding("server", "ok", f"EvalVault's, version {version}")
    elif wants_token:
        yield Finding("server", "warning", "cannot be told: it wants a token first, and has no /health")
    else:
        yield Finding("server", "ok", "answers as EvalVault's does; it has no /health")
    yield _token(settings, answer.status)
    yield Finding("round trip", "ok", f"{again.took_s * 1000:.1f} ms")
    yield _clock(again)


def _otlp_endpoint(settings: Settings) -> Finding:
    from evalvault_sdk.delivery.transport.otlp import OtlpTransport  # an extra

    with contextlib.closing(OtlpTransport(settings)) as transport:
        outcome = transport.probe()
    if isinstance(outcome, Delivered):
        return Finding("server", "ok", "an OTLP endpoint, which takes spans")
    reason = "the request is too large" if isinstance(outcome, TooLarge) else outcome.reason
    advice = outcome.advice if isinstance(outcome, RetryLater) else None
    return Finding("server", "problem", reason, advice or "see the log of what answers there")


def _version(health: _Answer) -> str | None:
    try:
        said = orjson.loads(health.body)
    except orjson.JSONDecodeError:
        return None
    ours = health.status == 200 and isinstance(said, dict) and said.get("status") == "ok"
    return str(said["version"]) if ours and "version" in said else None


def _token(settings: Settings, status: int) -> Finding:
    if status == 401:
        text = "the server wants one, and none is set" if settings.token is None else "it is not the server's"
        return Finding("token", "problem", text, "set EVALVAULT_API_TOKEN to the token that the server was given")
    if status == 403:
        advice = "check the scope of EVALVAULT_API_TOKEN, and what stands before the server"
        return Finding("token", "problem", "it may not write", advice)
    return Finding("token", "ok", "none is wanted" if settings.token is None else "accepted")


def _clock(answer: _Answer) -> Finding:
    try:
        told = email.utils.parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
    except (ValueError, TypeError, IndexError):
        return Finding("clock", "ok", "the server does not tell its time")
    ahead_s = answer.at - answer.took_s / 2 - (told + 0.5)  # it tells whole seconds
    if abs(ahead_s) <= _MAX_CLOCK_DIFFERENCE_S:
        return Finding("clock", "ok", f"as the server's, within {_MAX_CLOCK_DIFFERENCE_S:g} s")
    text = f"{abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"
    return Finding("clock", "warning", text, "set both by NTP: stages of several machines are ordered by their times")


# -- disk -------------------------------------------------------------------------------------------


def _file(settings: Settings, destination: str) -> Iterator[Finding]:
    """Check a destination that is a file of events, or a database."""
    path = Path(destination).absolute()
    what = "file" if settings.file is not None else "database"
    try:
        if path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_APPEND))
            if settings.file is None:
                open_store(str(path), read_only=True).close()
        if settings.file is None or not path.exists():  # a database has files beside it
            _try_writing(path.parent)
    except (OSError, EvalVaultError) as error:
        advice = "check the folder, its rights, and whether it is there"
        yield Finding(what, "problem", f"{path}: {_said(error)}", advice)
        return
    free = shutil.disk_usage(path.parent).free
    yield Finding(what, "ok", f"{path} can be written; {_mebibytes(free)} free")


def _spool(settings: Settings, root: Path, destination: str) -> Iterator[Finding]:
    folder = folder_of(root, destination)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder, destination)
        _try_writing(folder)
        locks = _locks_work(folder)
        free = shutil.disk_usage(folder).free
        segments = Destination(folder, destination).segments()
        events = sum(kept.count() for kept in segments)
    except OSError as error:
        advice = "give this user the folder, or set EVALVAULT_SPOOL_DIR to another one"
        yield Finding("spool", "problem", f"{folder}: {_said(error)}", advice)
        return
    finally:
        _remove(folder, missing)
    yield Finding("spool", "ok", f"{folder} is private, and can be written")
    if locks:
        yield Finding("spool locks", "ok", "they work")
    else:
        advice = "use a local disk, or deliver by `evalvault-sdk spool replay --force` what ended services leave"
        yield Finding("spool locks", "problem", "the file system has none", advice)
    used = sum(kept.size for kept in segments)
    text = f"{_mebibytes(used)} of {_mebibytes(settings.spool_max_bytes)} used; {_mebibytes(free)} free on the disk"
    if free < settings.spool_max_bytes - used:
        advice = "make room, or set EVALVAULT_SPOOL_MAX_BYTES to what the disk has"
        yield Finding("spool room", "warning", text, advice)
    elif used > settings.spool_max_bytes * 0.9:
        yield Finding("spool room", "warning", text, "find out why nothing is delivered: see above")
    else:
        yield Finding("spool room", "ok", text)
    yield Finding("spool events", "ok", f"{events:,} wait to be delivered")


def _try_writing(folder: Path) -> None:
    """Write a file and remove it again. Raises `OSError`."""
    path = folder / f"doctor-{os.urandom(8).hex()}"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "wb") as out:
            out.write(b"written")
    finally:
        path.unlink()


def _locks_work(folder: Path) -> bool:
    path = str(folder / f"doctor-{os.urandom(8).hex()}")
    file, locked = take_lock(path, make=True)
    try:
        second, _ = take_lock(path, make=False)
        if second is not None:
            os.close(second)
        return locked and second is None
    finally:
        os.unlink(path)  # noqa: PTH108 - text, as locks are named
        if file is not None:
            os.close(file)


def _remove(folder: Path, made: list[Path]) -> None:
    """Remove the folders that were not there before: a service of another user may be the one to make them."""
    if folder in made:
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [DESTINATION_FILE]:  # noqa: PTH208 - names are what counts
                (folder / DESTINATION_FILE).unlink()
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
