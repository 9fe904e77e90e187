"""
What the speed claims rest on, in one command: SDKs side by side, then this package's options, troubles and server.

    make bench                          # all of it
    make bench ONLY=healthy,exit ROUNDS=5
    make bench ONLY=growth              # with up to ten million events stored: only when it is asked for
    python -m benchmarks --help

In:   names of parts, a number of rounds.
Out:  tables on standard output; of the SDKs side by side also files in `benchmarks/results` (`benchmarks.report`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from benchmarks import report
from benchmarks.recording import measure
from benchmarks.situations import SITUATIONS

#: Parts that are programs of their own.
_PROGRAMS = ("options", "trouble", "scale", "server")
#: Those that take too long to belong to "all of it".
_ON_REQUEST = ("growth",)


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[1])
    parser.add_argument(
        "--only", default="", help=f"of {', '.join((*SITUATIONS, *_PROGRAMS, *_ON_REQUEST))}; separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the SDKs side by side")
    options = parser.parse_args()
    parts = [part for part in options.only.split(",") if part] or [*SITUATIONS, *_PROGRAMS]
    if unknown := set(parts) - {*SITUATIONS, *_PROGRAMS, *_ON_REQUEST}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    situations = [SITUATIONS[part] for part in parts if part in SITUATIONS]
    results = {}
    if situations:
        print("Every SDK in a process of its own, in turns. What is not default, so that nothing is lost:\n")
        report.say_configuration(dict.fromkeys(name for situation in situations for name in situation.subjects))
    started = time.monotonic()
    for situation in situations:
        results[situation.name] = measure(situation, options.rounds)
        report.show(situation.name, results[situation.name])
    if results:
        only = f" ONLY={options.only}" if options.only else ""
        report.write(results, options.rounds, f"make bench{only} ROUNDS={options.rounds}")
        print(f"\nIn {time.monotonic() - started:.0f} s; files are in {report.RESULTS}")
    for part in parts:
        if part not in SITUATIONS:
            subprocess.run([sys.executable, "-m", f"benchmarks.{part}"], check=True)


if __name__ == "__main__":
    main()
