"""
Compile what every stage goes through: the same files that are run as they are where nothing was compiled.

In:   the modules that have a `.pxd` beside them, which gives their attributes types; Cython, a C compiler.
Out:  extension modules beside the sources, which Python prefers to them: in a wheel (`pip install`, `make dist`), or
      in the checkout (`make compiled`).

Without a compiler, or on another Python than CPython, the wheel is one for any machine, with the sources alone. An
editable install is never compiled: it would go on running what was compiled before an edit. `EVALVAULT_SDK_COMPILE=0`
compiles nothing, `=1` fails where it cannot.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DIRECTIVES = {
    "language_level": 3,
    # Hints are for people and for mypy: what a program assigns may be anything, compiled or not.
    "annotation_typing": False,
    # None where an object is expected raises, as in Python. Without this it would end the process.
    "nonecheck": True,
    # A number that outgrows its type raises, and does not begin again below zero.
    "overflowcheck": True,
}


def compile_core(root: Path, into: Path) -> dict[Path, str]:
    """Compile the modules below `root`; return where the results are, and where they belong in the package."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    before = Path.cwd()
    sources = sorted(path.relative_to(root).with_suffix(".py") for path in root.glob("evalvault_sdk/**/*.pxd"))
    os.chdir(root)  # Cython finds a module's package, and its `.pxd`, by the way to it
    try:
        with tempfile.TemporaryDirectory() as scratch:
            flags = [] if sys.platform == "win32" else ["-g0"]
            extensions = [
                Extension(".".join(source.with_suffix("").parts), [str(source)], extra_compile_args=flags)
                for source in sources
            ]
            made = cythonize(extensions, build_dir=scratch, compiler_directives=_DIRECTIVES, quiet=True, nthreads=0)
            command = build_ext(Distribution({"name": "evalvault-sdk", "ext_modules": made}))
            command.build_lib, command.build_temp, command.parallel = str(into), scratch, os.cpu_count()
            command.ensure_finalized()
            command.run()
            return {into / name: name for name in map(command.get_ext_filename, (one.name for one in made))}
    finally:
        os.chdir(before)


class CompiledCore(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the compiled modules into wheels."""

    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before a wheel is put together."""
        wanted = os.environ.get("EVALVAULT_SDK_COMPILE", "")
        if version == "editable" or wanted == "0" or platform.python_implementation() != "CPython":
            return
        self._scratch = tempfile.TemporaryDirectory()
        try:
            made = compile_core(Path(self.root), Path(self._scratch.name))
        except (Exception, SystemExit) as error:
            if wanted:
                raise
            self.app.display_warning(f"evalvault-sdk is not compiled, and records at half the speed: {error}")
            return
        build_data["force_include"].update({str(path): name for path, name in made.items()})
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clean up when the wheel is there."""
        if self._scratch is not None:
            self._scratch.cleanup()


if __name__ == "__main__":
    here = Path(__file__).parent
    for path in compile_core(here, here):
        print(path.relative_to(here), file=sys.stderr)
