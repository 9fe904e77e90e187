"""
Read the files that configure the server.

In:   the path of a JSON, TOML or YAML file, told apart by its suffix.
Out:  the object in it, or a `ConfigurationError` that says where it is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from evalvault_sdk.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Nobody writes a larger one by hand; a map of relevant documents may be made by a program.
_MAX_BYTES = 64 << 20

_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}


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
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # json's and tomllib's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{path} is no {file.suffix[1:].upper()}: {reason[:300]}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} must hold an object at its top")
    return value
