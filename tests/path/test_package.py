"""The wheel, installed into clean environments: no fault of packaging hides behind the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
import zipfile
from pathlib import Path

import pytest

from tests.support import DATA, ROOT, LiveServer, free_port

CORE = {"attrs", "orjson", "requests", "tenacity", "certifi", "charset-normalizer", "idna", "urllib3"}

SEND_A_TRACE = textwrap.dedent(
    """
    import sys
    from evalvault_sdk import StageTracer
    with StageTracer(sys.argv[1], sys.argv[2]) as tracer:
        with tracer.stage("request"):
            tracer.record_stage("input", attributes={"query": "보험 보장금액은?"})
    assert tracer.stats().complete, tracer.stats()
    """
)

SERVE_AND_SEND = textwrap.dedent(
    """
    import sys, threading, time
    import requests, uvicorn
    from evalvault_sdk import StageTracer
    from evalvault_sdk.server import create_app
    port = int(sys.argv[1])
    server = uvicorn.Server(uvicorn.Config(create_app("x.db"), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    with StageTracer("packaged", f"http://127.0.0.1:{port}") as tracer:
        tracer.record_stage("input")
    assert tracer.stats().complete, tracer.stats()
    summary = requests.get(f"http://127.0.0.1:{port}/api/stage/summary/packaged").json()
    assert summary["total_events"] == 1, summary
    server.should_exit = True
    thread.join()
    """
)


#: The modules that are compiled.
COMPILED = {path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "evalvault_sdk").rglob("*.pxd")}
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def build(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(folder), str(ROOT)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def compiled_modules(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith((".pxd", ".c")) for name in names)
    return {name.partition(".")[0] for name in names if name.endswith((".so", ".pyd"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built of the sdist that is built of the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


class Environment:
    """A new virtual environment with the wheel and one extra in it."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        requirement = f"evalvault-sdk{extra} @ {wheel.as_uri()}"
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement)

    def run(self, program: str, *arguments: str, status: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr


def test_the_core_alone_sends_a_trace(wheel: Path, tmp_path: Path, server: LiveServer) -> None:
    environment = Environment(tmp_path, wheel, "")
    run = f"run-{uuid.uuid4()}"
    environment.run("python", "-W", "error", "-c", SEND_A_TRACE, run, server.url)
    assert server.get(f"summary/{run}")["total_events"] == 2
    listed = json.loads(environment.run("python", "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))
    installed = {package["name"].lower().replace("_", "-") for package in listed}
    assert installed - {"pip", "setuptools", "wheel", "evalvault-sdk"} <= CORE | {"typing-extensions"}
    assert "pip install 'evalvault-sdk[cli]'" in environment.run("evalvault-sdk", "--version", status=1)
    missing = environment.run("python", "-c", "from evalvault_sdk.server import create_app", status=1)
    assert "pip install 'evalvault-sdk[server]'" in missing


def test_the_server_extra_receives_a_trace(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel, "[server]")
    environment.run("python", "-c", SERVE_AND_SEND, str(free_port()))


def test_the_cli_extra_sends_and_shows_over_http(wheel: Path, tmp_path: Path, server: LiveServer) -> None:
    environment = Environment(tmp_path, wheel, "[cli]")
    file = DATA / "run_20260103_001.jsonl"
    assert "5 events stored" in environment.run("evalvault-sdk", "ingest", str(file), "--url", server.url)
    assert "rerank" in environment.run("evalvault-sdk", "show", "run_20260103_001", "--url", server.url)
    missing = environment.run("evalvault-sdk", "serve", status=1)
    assert "pip install 'evalvault-sdk[server]'" in missing


def test_the_demo_extra_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, wheel, "[demo]")
    assert "The SDK's account: recorded" in environment.run("evalvault-sdk", "demo")


@needs_a_compiler
def test_what_records_stages_is_compiled_in_the_wheel(wheel: Path, tmp_path: Path, server: LiveServer) -> None:
    assert COMPILED
    assert compiled_modules(wheel) == COMPILED
    assert "py3-none-any" not in wheel.name
    environment = Environment(tmp_path, wheel, "")
    modules = sorted(name.replace("/", ".") for name in COMPILED)
    script = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {modules}))"
    assert not any(path.endswith(".py") for path in environment.run("python", "-c", script).split())


@pytest.mark.parametrize("environment", [{"EVALVAULT_SDK_COMPILE": "0"}, {"CC": "there-is-no-compiler"}])
def test_a_wheel_for_any_machine_is_built_on_demand_and_without_a_compiler(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = build(tmp_path, "--wheel", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*-py3-none-any.whl")
    assert not compiled_modules(built)
    assert ("records at half the speed" in done.stdout + done.stderr) == ("CC" in environment)


def test_who_wants_it_compiled_is_told_where_it_cannot_be(tmp_path: Path) -> None:
    done = build(tmp_path, "--wheel", CC="there-is-no-compiler", EVALVAULT_SDK_COMPILE="1")
    assert done.returncode != 0
    assert "there-is-no-compiler" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_the_wheel_is_typed_and_holds_what_it_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "evalvault_sdk/py.typed" in names
    assert "evalvault_sdk/cli/custom_rag_example.py" in names
    for path in (ROOT / "evalvault_sdk").rglob("*"):
        if path.suffix in (".py", ".sql"):
            assert path.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) for name in names)
    assert any(name.endswith("LICENSE") for name in names)
