"""
Every error this package raises, as one tree::

    EvalVaultError
    ├── ConfigurationError        (ValueError)   a setting is wrong: which, and what it may be
    ├── InvalidStageEventError    (ValueError)   an event breaks EvalVault's rules: which field, and how
    ├── MissingDependencyError    (ImportError)  an extra is not installed: how to install it
    ├── StoreError                               the server's database failed
    ├── UnsupportedError                         this kind of database cannot do that
    └── RunNotFoundError          (LookupError)  there are no events of a run

The first three meet you at construction. Recording (`stage`, `record_stage`, `record_batch`, `flush`,
`shutdown`) raises none of them: there, faults are counted in `stats()` and logged.
"""

from __future__ import annotations

import collections
from typing import Any


class EvalVaultError(Exception):
    """The base of all errors of this package."""


class ConfigurationError(EvalVaultError, ValueError):
    """A setting has a value that cannot work; the message names the setting and the values it may have."""


class InvalidStageEventError(EvalVaultError, ValueError):
    """
    An event breaks one of EvalVault's rules.

    `field` is the JSON field at fault (`"duration_ms"`, `"input_ref.store"`), and `str(error)` a sentence
    that names it. Values are never part of the message: they may be personal data.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidStageEventError], tuple[str, str]]:
        # Exceptions are pickled by their args, and ours take two: without this, crossing a process pool fails.
        return type(self), (self.field, self.problem)


class MissingDependencyError(EvalVaultError, ImportError):
    """A feature needs an extra of this package; the message has the `pip install` line."""

    @classmethod
    def for_extra(cls, feature: str, extra: str, cause: ImportError) -> MissingDependencyError:
        """Say which extra `feature` needs, after `cause` was raised by importing one of its packages."""
        missing = cause.name or str(cause)
        return cls(f"{feature} needs the package {missing!r}: pip install 'evalvault-sdk[{extra}]'")


class StoreError(EvalVaultError):
    """The server's database failed; the same request may succeed later."""


class UnsupportedError(EvalVaultError):
    """The server's database is of a kind that cannot do what is asked; the message says what can."""


class RunNotFoundError(EvalVaultError, LookupError):
    """There is no stage event of this run."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"there are no stage events of the run {run_id!r}")


#: Errors that mean that somebody called the work off, by module and name: most of them are never imported here.
_CANCELLATIONS = frozenset(
    {
        ("builtins", "GeneratorExit"),
        ("builtins", "KeyboardInterrupt"),
        ("asyncio.exceptions", "CancelledError"),
        ("concurrent.futures._base", "CancelledError"),
        ("greenlet", "GreenletExit"),
        ("trio", "Cancelled"),
    }
)


def cancellation(error: BaseException) -> str | None:
    """Return the name of the error that called a stage off, or None if `error` says that it failed."""
    for kind in type(error).__mro__:
        if (kind.__module__, kind.__name__) in _CANCELLATIONS:
            return kind.__name__
    return None


def describe_error(error: BaseException, frames: int = 0) -> dict[str, Any]:
    """
    Return `{"type", "message"}` of an exception, as a failed stage has it in `attributes.error`.

    With `frames`, also the innermost frames of its `traceback`, as "file:line:function": no values, no text.
    """
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    try:
        message = str(error) if _is_short(error) else f"<{kind.__qualname__} with large arguments>"
    except Exception:  # noqa: BLE001 - a user's __str__
        message = f"<{kind.__qualname__} whose message cannot be shown>"
    described: dict[str, Any] = {
        "type": kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}",
        "message": message,
    }
    if frames > 0:
        # A traceback that is deeper than the recursion allows is walked, not recursed.
        summary: collections.deque[str] = collections.deque(maxlen=frames)
        step = error.__traceback__
        while step is not None:
            code = step.tb_frame.f_code
            summary.append(f"{code.co_filename}:{step.tb_lineno}:{code.co_name}")
            step = step.tb_next
        described["traceback"] = list(summary)
    return described


def _is_short(error: BaseException) -> bool:
    """Whether the text of an exception is soon made: by default it shows its arguments, whatever they are."""
    return type(error).__str__ is not BaseException.__str__ or all(
        isinstance(argument, str) or not hasattr(argument, "__len__") or len(argument) < 1000 for argument in error.args
    )
