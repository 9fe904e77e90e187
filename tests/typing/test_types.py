"""Types pass through: what a user decorates stays to type checkers what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

USER_CODE = Path(__file__).with_name("user_code.py")


def test_mypy_sees_the_original_types() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-version=3.10", str(USER_CODE)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_sees_the_original_types(tmp_path: Path) -> None:
    (tmp_path / "user_code.py").write_bytes(USER_CODE.read_bytes())
    settings = {
        "include": ["user_code.py"],  # pyright takes no absolute path
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.10",
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": True,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--project", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert result["generalDiagnostics"] == [], done.stdout
    assert result["summary"]["filesAnalyzed"] == 1
