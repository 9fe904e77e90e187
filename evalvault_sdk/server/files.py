"""
Read the files that configure the server.

In:   the path of a JSON, TOML or YAML file, told apart by its suffix.
Out:  the object in it, or a `ConfigurationError` that says where it is wrong.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalvault_sdk.errors import ConfigurationError, MissingDependencyError

#: Nobody writes a larger one by hand; a map of relevant documents may be made by a program.
_MAX_BYTES = 64 << 20


def _toml(text: str) -> Any:
    try:
        return importlib.import_module("tomllib").loads(text)
    except ModuleNotFoundError:  # Python 3.10
        return _needed("tomli").loads(text)


def _yaml(text: str) -> Any:
    yaml = _needed("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _needed(name: str) -> Any:
    # When a file is read, not before: the command does without the server's packages.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError.for_extra("this file", "server", error) from error


_READERS: dict[str, Callable[[str], Any]] = {".json": json.loads, ".toml": _toml, ".yaml": _yaml, ".yml": _yaml}


def read_config_file(path: str) -> dict[str, Any]:
    """Return the object in a file. Raises `ConfigurationError`."""
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigurationError(f"{path} must be a .json, .toml, .yaml or .yml file")
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigurationError(f"{path} is larger than {_MAX_BYTES >> 20} MiB")
        value = reader(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # json's and tomllib's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is no {file.suffix[1:].upper()}: {reason[:300]}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} must hold an object at its top")
    return value
