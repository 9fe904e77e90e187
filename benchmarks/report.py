"""
Tell what was measured: tables for people, ratios for the README, a plot.

In:   the figures of every round, by situation and SDK.
Out:  a table for each situation: medians, with the lowest and the highest; how many times better the first SDK is.
      `figures.json` (this machine's, not kept), `ratios.json` and `ratios.png` in a folder.

A ratio is taken round by round, and the median of those is told: what slows a whole round does not count.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.recording import Figures
from benchmarks.situations import FRAMEWORKS, HIGHER_IS_BETTER, MEASURES, SITUATIONS, Situation
from benchmarks.subjects import SUBJECTS
from tests.support import is_compiled

RESULTS = Path(__file__).with_name("results")
#: Of each situation and SDK the figures of every round.
Results = Mapping[str, Mapping[str, Sequence[Figures]]]
#: By situation, measure and SDK the median, the lowest and the highest.
Ratios = Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
Spread = tuple[float, float, float]


def spread(values: Iterable[float]) -> Spread | None:
    """Return the median, the lowest and the highest; None of nothing."""
    known = list(values)
    return (statistics.median(known), min(known), max(known)) if known else None


def times_better(measure: str, ours: Sequence[Figures], theirs: Sequence[Figures]) -> Spread | None:
    """Return how many times better ours are: how many times as much the others cost, or as little they deliver."""
    pairs = [
        (our[measure], their[measure])
        for our, their in zip(ours, theirs, strict=True)
        if measure in our and measure in their
    ]
    if measure in HIGHER_IS_BETTER:
        pairs = [(their, our) for our, their in pairs]
    return spread(their / our for our, their in pairs if our > 0 and their > 0)


def text_of(situation: Situation, measure: str) -> str:
    """Return the sentence for a measure in a situation."""
    text = MEASURES[measure]
    return text.replace("per stage", "per call") if situation.form in FRAMEWORKS else text


def show(situation_name: str, results: Mapping[str, Sequence[Figures]]) -> None:
    """Print a situation's table, in Markdown."""
    situation = SITUATIONS[situation_name]
    first, *others = results
    rounds = len(results[first])
    print(f"\n### {situation.title} (`{situation_name}`): median of {rounds} (lowest to highest), times {first}\n")
    columns = [first, *others]
    print(f"| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for measure in situation.measures:
        cells = []
        for name in columns:
            found = spread(row[measure] for row in results[name] if measure in row)
            if found is None:
                cells.append("failed, or took too long")
                continue
            cell = "{} ({} to {})".format(*map(_number, found))
            better = times_better(measure, results[first], results[name]) if name != first else None
            cells.append(f"{cell} **{_number(better[0])}×**" if better else cell)
        print(f"| {text_of(situation, measure)} | {' | '.join(cells)} |")
    arrived = [[row["arrived_part"] for row in results[name] if "arrived_part" in row] for name in columns]
    if any(arrived) and situation.form in FRAMEWORKS:
        print(f"| stages of a call | {' | '.join(_number(max(parts, default=0)) for parts in arrived)} |")
        shares = [
            spread(row["caller_p50_us"] / row["arrived_part"] for row in results[name] if row.get("arrived_part"))
            for name in columns
        ]
        told = ("" if share is None else _number(share[0]) for share in shares)
        print(f"| caller, µs per stage, median | {' | '.join(told)} |", flush=True)
    elif any(arrived):
        print(f"| arrived, % | {' | '.join(_percent(parts) for parts in arrived)} |", flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(parts: Sequence[float]) -> str:
    if not parts:
        return ""
    return f"{math.floor(min(parts) * 1000) / 10:g}"  # 100 is all


def ratios_of(results: Results) -> Ratios:
    """Return how many times better the first SDK is than each other: by situation, measure and SDK."""
    told: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for situation_name, rows in results.items():
        first, *others = rows
        for measure in SITUATIONS[situation_name].measures:
            for name in others:
                if better := times_better(measure, rows[first], rows[name]):
                    told.setdefault(situation_name, {}).setdefault(measure, {})[name] = dict(
                        zip(("median", "lowest", "highest"), (_three_digits(value) for value in better), strict=True)
                    )
    return told


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def show_ratios(ratios: Ratios) -> None:
    """Print all ratios against peers as one table, in Markdown: for the README."""
    rows = peer_rows(ratios)
    names = list(dict.fromkeys(name for _, peers in rows for name in peers))
    print(f"\n| how many times better | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for text, peers in rows:
        print(f"| {text} | {' | '.join(_number(peers[n]['median']) if n in peers else '' for n in names)} |")


def peer_rows(ratios: Ratios) -> list[tuple[str, Mapping[str, Mapping[str, float]]]]:
    """Return a text and the ratios for each measure, without those of us against ourselves."""
    rows = [
        (
            f"{situation_name}: {text_of(SITUATIONS[situation_name], measure)}",
            {name: ratio for name, ratio in all_of_it.items() if not name.startswith("evalvault-sdk")},
        )
        for situation_name, measures in ratios.items()
        for measure, all_of_it in measures.items()
    ]
    return [(text, peers) for text, peers in rows if peers]


def write(results: Results, rounds: int, command: str) -> None:
    """Write the two JSON files and the plot; print the ratios."""
    RESULTS.mkdir(exist_ok=True)
    about = {
        "command": command,
        "rounds": rounds,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "evalvault_sdk": "compiled" if is_compiled() else "not compiled",
        "versions": {name: metadata.version(name) for name in _distributions(results)},
        "configured": {name: SUBJECTS[name].configured for name in _subjects(results) if SUBJECTS[name].configured},
        "measures": MEASURES,
        "ratio": "how many times better the first SDK of a situation is; the median over the rounds",
    }
    ratios = ratios_of(results)
    for name, content in (("figures.json", results), ("ratios.json", ratios)):
        text = json.dumps({"about": about, "results": content}, indent=1, ensure_ascii=False)
        (RESULTS / name).write_text(text + "\n", encoding="utf-8")
    plot(ratios, RESULTS / "ratios.png")
    show_ratios(ratios)


def _subjects(results: Results) -> list[str]:
    return sorted({name for rows in results.values() for name in rows})


def _distributions(results: Results) -> list[str]:
    return sorted({one for name in _subjects(results) for one in SUBJECTS[name].distributions})


def plot(ratios: Ratios, path: Path) -> None:
    """Draw a point for each ratio against a peer: a row for each measure of each situation, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    rows = peer_rows(ratios)
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.28 * len(rows)), layout="constrained")
    names = sorted({name for _, peers in rows for name in peers})
    markers = dict(zip(names, "osD^vP*X", strict=False))
    for name in names:
        points = [(peers[name], place) for place, (_, peers) in enumerate(rows) if name in peers]
        axes.errorbar(
            [ratio["median"] for ratio, _ in points],
            [place for _, place in points],
            xerr=[
                [max(0.0, ratio["median"] - ratio["lowest"]) for ratio, _ in points],
                [max(0.0, ratio["highest"] - ratio["median"]) for ratio, _ in points],
            ],
            fmt=markers[name],
            markersize=6,
            linewidth=0.8,
            label=name,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_yticks(range(len(rows)), [text for text, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_xlabel("how many times better evalvault-sdk is (1× is equal)")
    figure.legend(loc="outside upper center", ncols=min(4, len(names)))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def say_configuration(names: Iterable[str]) -> None:
    """Print what of each SDK is not default, and its version."""
    for name in names:
        subject: Any = SUBJECTS[name]
        versions = ", ".join(f"{one} {metadata.version(one)}" for one in subject.distributions)
        print(f"- {name}: {versions}; set: {subject.configured or 'nothing'}")
