"""The directions of design: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "evalvault_sdk"
BASE = {
    *("errors", "late", "log", "ids", "jsontext", "events", "checks", "config"),
    *("builder", "payload", "oversize", "private"),
}
#: A part of the package, and the parts it may import besides itself and BASE.
MAY_IMPORT = {
    "capture": set(),
    "delivery": {
        "otel",
        "__init__",
    },  # for the version it sends as its User-Agent; the store transport also: the server
    "tracer": {"capture", "delivery", "assembly"},
    "assembly": {"capture", "delivery"},
    "otel": set(),
    "server": {"otel", "__init__"},
    "cli": {"server", "delivery", "capture", "__init__"},
    "integrations": {"capture", "delivery", "tracer", "default", "otel", "__init__"},
    "default": {"capture", "delivery", "tracer"},
    "testing": {"capture", "delivery", "tracer", "default"},
    "pytest_plugin": {"testing"},
    "__init__": {"capture", "delivery", "tracer", "default", "integrations"},
}
#: A third-party package, and the only places that may import it.
ONLY_IN = {
    "fastapi": {
        "server/app.py",
        "server/mounting.py",
        *(f"server/routes/{name}.py" for name in ("__init__", "base", "drafted", "live", "otlp", "read", "write")),
    },
    "starlette": {
        "server/app.py",
        "server/body.py",
        *(f"server/routes/{name}.py" for name in ("base", "live", "read", "write")),
    },
    "fastapi_offline": {"server/app.py"},
    "uvicorn": {"server/program.py"},
    "zstandard": {"delivery/transport/pack.py", "server/body.py"},
    "yaml": set(),  # by name, in server/files.py, when a file is read
    "opentelemetry": {"server/otlp/protobuf.py", "integrations/opentelemetry.py", "delivery/transport/otlp.py"},
    "google": {"server/otlp/protobuf.py", "delivery/transport/otlp.py"},
    "langchain_core": {f"integrations/langchain/{name}.py" for name in ("current", "handler", "instrument")},
    "typer": {"cli/app.py"},
    "rich": {"cli/app.py", "cli/demo.py", "cli/draw.py"},
    "prometheus_client": {"integrations/prometheus.py", "server/telemetry.py"},
    "llama_index": {"integrations/llama_index/__init__.py"},
    "psycopg": {"server/store/postgres.py"},
    "psycopg_pool": {"server/store/postgres.py"},
    "evalvault": {"server/store/evalvault.py", "server/mounting.py"},
    "tenacity": {"delivery/breaker.py"},
    "pytest": {"pytest_plugin.py"},
    "requests": {
        "delivery/transport/http.py",
        "delivery/transport/deadline.py",
        "cli/source.py",
        "cli/demo.py",
        "cli/doctor.py",
    },
}


def imports_of(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py")
    allowed = BASE | {part} | MAY_IMPORT.get(part, set())
    for name in imports_of(path.read_text(encoding="utf-8")):
        root, _, rest = name.partition(".")
        if root == "evalvault_sdk":
            if relative.as_posix() == "delivery/transport/store.py" and rest.startswith("server."):
                continue
            target = rest.partition(".")[0]
            if not (PACKAGE / target).exists() and not (PACKAGE / f"{target}.py").exists():
                target = "__init__"  # a name, not a module
            assert target in allowed, f"{relative} must not import {name}"
        elif root in ONLY_IN:
            assert relative.as_posix() in ONLY_IN[root], f"{relative} must not import {root}"
