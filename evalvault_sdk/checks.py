"""
Check and read single settings.

In:   an argument of any type, or the text of a variable.
Out:  the value in its form, or a `ConfigurationError` (for an argument) or a `ValueError` (for a variable's
      text) that says what it may be. Never the value itself: it may be a secret.
Pure. Named `is_...`: attrs validators. Named `read_...`: readers of variables. The others: converters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.events import run_id_problem

#: Nobody means to wait longer than this; much longer ones overflow in the operating system.
_LONGEST_S = 86_400.0


def one_of(*allowed: str) -> Callable[[Any, Any, Any], None]:
    """Accept one of `allowed`."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if value not in allowed:
            raise ConfigurationError(f"{attribute.name} must be one of: {', '.join(allowed)}")

    return check


def some_of(*allowed: str) -> Callable[[Any, Any, Any], None]:
    """Accept a tuple of some of `allowed`."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if not isinstance(value, tuple) or not all(name in allowed for name in value):
            raise ConfigurationError(f"{attribute.name} must be some of: {', '.join(allowed)}")

    return check


def count(minimum: int, maximum: int = 1 << 48) -> Callable[[Any, Any, Any], None]:
    """Accept a whole number of at least `minimum`."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            bounds = f"of at least {minimum}" if maximum == 1 << 48 else f"from {minimum} to {maximum}"
            raise ConfigurationError(f"{attribute.name} must be a whole number {bounds}")

    return check


def seconds(minimum: float, maximum: float = _LONGEST_S) -> Callable[[Any, Any, Any], None]:
    """Accept a number of seconds from `minimum` to `maximum`, by default a day."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not minimum <= value <= maximum:
            raise ConfigurationError(f"{attribute.name} must be a number of seconds from {minimum:g} to {maximum:.0f}")

    return check


def is_rate(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigurationError(f"{attribute.name} must be a number from 0 (no trace) to 1 (every trace)")


def is_milliseconds(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept a number of milliseconds, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12):
        raise ConfigurationError(f"{attribute.name} must be a number of milliseconds of at least 0")


def has_methods(*names: str) -> Callable[[Any, Any, Any], None]:
    """Accept an object with methods of these names, or None."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if value is not None and not all(callable(getattr(value, name, None)) for name in names):
            raise ConfigurationError(f"{attribute.name} must be an object with the method {' and '.join(names)}()")

    return check


def is_bool(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept True and False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{attribute.name} must be True or False")


def is_verify(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept what `requests` takes as `verify`."""
    # An empty path, from a variable that is not set perhaps, would switch verification off in requests.
    if not (isinstance(value, bool) or (isinstance(value, str) and value)):
        raise ConfigurationError(f"{attribute.name} must be True, False, or the path of a file or folder of CAs")


def is_path(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept the path of a file, or None."""
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ConfigurationError(f"{attribute.name} must be the path of a file")


def is_callable(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept something to call, or None."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{attribute.name} must be a function")


def is_cert(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept what `requests` takes as `cert`, or None."""
    parts = (value,) if isinstance(value, str) else value
    if value is not None and not (
        isinstance(parts, tuple) and len(parts) <= 2 and all(isinstance(part, str) and part for part in parts)
    ):
        raise ConfigurationError(f"{attribute.name} must be the path of a certificate, or (certificate, key)")


def is_text_mapping(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept a dict of text to text that fits into HTTP headers, or None."""
    good = value is None or (
        isinstance(value, Mapping)
        and all(
            isinstance(text, str) and text.isascii() and text.isprintable() for pair in value.items() for text in pair
        )
    )
    if not good:
        raise ConfigurationError(f"{attribute.name} must be a dict of names to values, both plain ASCII text")


def is_run_id(_instance: Any, _attribute: Any, value: Any) -> None:
    """Accept a name that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(
            "run_id is required: it names what is analysed together, for example 'rag-prod-2026-01-07'. "
            "Pass StageTracer(run_id=...) or set EVALVAULT_RUN_ID"
        )
    problem = run_id_problem(value)
    if problem is not None:
        raise ConfigurationError(f"run_id {problem}")


def is_url(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept an address that a path can be added to, without credentials."""
    try:
        parts = urlsplit(value)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        ok = ok and not (parts.query or parts.fragment or any(letter.isspace() for letter in value))
    except (ValueError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise ConfigurationError(
            f"{attribute.name} must be an http:// or https:// address such as http://localhost:8000, without ? or #"
        )
    if parts.username or parts.password:
        raise ConfigurationError(
            f"{attribute.name} must not hold a user name or password, which end up in logs: use token="
        )


def is_url_or_none(instance: Any, attribute: Any, value: Any) -> None:
    """Accept such an address, or None."""
    if value is not None:
        is_url(instance, attribute, value)


def is_token(_instance: Any, attribute: Any, value: Any) -> None:
    """Accept what fits into an HTTP header, or None."""
    if value is not None and (not isinstance(value, str) or not value.isascii() or not value.isprintable()):
        raise ConfigurationError(f"{attribute.name} must be one line of ASCII text: it travels in an HTTP header")


def number_or_none(minimum: float, maximum: float) -> Callable[[Any, Any, Any], None]:
    """Accept a number from `minimum` to `maximum`, or None."""

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and (not good or not minimum <= value <= maximum):
            raise ConfigurationError(f"{attribute.name} must be a number from {minimum:g} to {maximum:.0f}")

    return check


def stripped(value: Any) -> Any:
    """Take white space off both ends."""
    return value.strip() if isinstance(value, str) else value


def stripped_or_none(value: Any) -> Any:
    """Take white space off both ends; blank is None."""
    return stripped(value) or None


def as_path(value: Any) -> Any:
    """Return a path as text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_absolute_path(value: Any) -> Any:
    """Return a path as text from the root, with the user's home for `~`: the program may change its folder later."""
    value = as_path(value)
    if not isinstance(value, str) or not value.strip():
        return value
    return os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111 - text in, text out


def without_slash(value: Any) -> Any:
    """Take white space and a last slash off."""
    return value.strip().rstrip("/") if isinstance(value, str) else value


def read_flag(text: str) -> bool:
    """Read a switch."""
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be 1 or 0, true or false, yes or no, on or off")


def read_whole_number(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def read_number(text: str) -> float:
    """Read a number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def read_names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(name.strip().lower() for name in text.split(",") if name.strip())


def read_negated_flag(text: str) -> bool:
    """Read a switch that turns something off."""
    return not read_flag(text)
