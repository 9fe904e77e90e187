"""The README is true: its code runs, its table is that of `Settings`, its commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest

from evalvault_sdk import FolderPayloadStore, Settings
from evalvault_sdk.delivery.account import DropReason
from evalvault_sdk.server import ServerSettings
from tests.markdown import code_blocks
from tests.support import ROOT, LiveServer, clean_environment, run_block

README = (ROOT / "README.md").read_text(encoding="utf-8")
KOREAN = (ROOT / "README.ko.md").read_text(encoding="utf-8")


def test_the_korean_twin_says_the_same() -> None:
    assert code_blocks("python", KOREAN) == code_blocks("python", README)
    commands = re.compile(r"^\$ [^#\n]*", flags=re.MULTILINE)
    assert commands.findall(KOREAN) == commands.findall(README)
    assert len(re.findall(r"^## ", KOREAN, flags=re.MULTILINE)) == len(re.findall(r"^## ", README, flags=re.MULTILINE))

    def first_cells(text: str) -> list[str]:
        """What a table names, without what it says of it; of settings also variable and default."""
        rows = re.findall(r"^\| `.*", text, flags=re.MULTILINE)
        return [" | ".join(row.split(" | ")[: 3 if row.count(" | ") == 3 else 1]) for row in rows]

    assert first_cells(KOREAN) == first_cells(README)


def settings_row(field: attrs.Attribute[Any]) -> str:
    if field.default is attrs.NOTHING:
        default = "required"
    elif field.name == "headers":
        default = "`{}`"
    else:
        default = f"`{field.default!r}`".replace("'", '"')
    variable = f"`{field.metadata['env']}`" if field.metadata["env"] else ""
    return f"| `{field.name}` | {variable} | {default} | {field.metadata['help']} |"


def test_the_table_of_settings_is_that_of_the_class() -> None:
    table = README.split("## Settings")[1].split("## The server")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert rows == [settings_row(field) for field in attrs.fields(Settings)]


def test_the_table_of_the_servers_settings_is_that_of_its_class() -> None:
    table = README.split("## The server")[1].split("## The command")[0]
    rows = [line for line in table.splitlines() if "EVALVAULT_SERVER_" in line or "EVALVAULT_API_TOKEN" in line]
    rows = [row for row in rows if row.startswith("| `")]
    assert rows == [settings_row(field) for field in attrs.fields(ServerSettings)]


def test_the_recipes_for_deploying_use_variables_that_there_are() -> None:
    known = {field.metadata["env"] for field in attrs.fields(ServerSettings)}
    files = list((ROOT / "examples/deploy").iterdir())
    assert {file.name for file in files} == {"Dockerfile", "compose.yaml", "evalvault-stages.service"}
    for file in files:
        named = set(re.findall(r"EVALVAULT_[A-Z_]+", file.read_text(encoding="utf-8"))) - {"EVALVAULT_API_URL"}
        assert named
        assert named <= known, file


#: What needs EvalVault itself is run by `make interop`.
BLOCKS = [block for block in code_blocks("python", README) if "from evalvault." not in block]


@pytest.mark.parametrize("number", range(8))
def test_every_block_of_code_runs(server: LiveServer, tmp_path: Path, number: int) -> None:
    assert len(BLOCKS) == 8
    done = run_block(BLOCKS[number], tmp_path, server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    if "evalvault_stages" in BLOCKS[number]:
        assert "1 passed" in done.stdout
    if number == 0:
        assert done.stdout == "recorded 3 = delivered 3\n"
        assert server.get("summary/rag-001")["stage_type_counts"]["request"] >= 1


def test_what_the_readme_says_of_its_examples_is_so(tmp_path: Path) -> None:
    for number in (2, 4):
        script = tmp_path / f"block_{number}.py"
        script.write_text(BLOCKS[number], encoding="utf-8")
        subprocess.run([sys.executable, script], env=clean_environment(), cwd=tmp_path, check=True, timeout=60)
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    retrieval, output, _, prompt = [json.loads(line) for line in lines]
    assert retrieval["attributes"] == {
        "query": "보험 보장금액은?",
        "top_k": 2,
        "doc_ids": ["doc-1", "doc-7"],
        "scores": [0.91, 0.72],
    }
    assert output["attributes"]["model"] == "gpt-4"
    assert output["attributes"]["item_count"] == 3
    assert prompt["attributes"] == {"prompt": "Write to [email]", "api_key": "[secret]"}
    stored = FolderPayloadStore(tmp_path / "payloads").get(prompt["output_ref"])
    assert len(json.loads(stored)) == 1000


def test_every_command_is_one() -> None:
    named = set(re.findall(r"\$ evalvault-sdk (\w+)", README))
    assert named == {"serve", "token", "ingest", "show", "spool", "doctor", "demo"}
    for name in named:
        done = subprocess.run(
            [sys.executable, "-m", "evalvault_sdk.cli", name, "--help"], env=clean_environment(), capture_output=True
        )
        assert done.returncode == 0


def test_every_make_target_is_one() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w[\w-]*)", README)) - {"lint"}:
        assert f"\n{target}:" in makefile


def test_every_reason_of_a_drop_is_explained() -> None:
    table = README.split("| reason |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(get_args(DropReason))
