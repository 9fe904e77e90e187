"""
Draw a run in the terminal.

In:   the objects that the API returns; what is spooled, and what was done with it; what the doctor found.
Out:  rich tables: stage types, one trace as a waterfall, failing metrics, recommendations; the spool.
Pure, but for the console it draws on, and the spool, which is read as it is drawn. What events hold is escaped:
a query with brackets is no markup.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from evalvault_sdk.cli.doctor import Finding, Setting
    from evalvault_sdk.cli.spool import Destination, Kept, Replayed

#: Cells of a waterfall's bars at least and at most, and of everything beside them.
_MIN_BAR, _MAX_BAR, _BESIDE_BAR = 12, 40, 62
#: Failing metrics listed at most.
_MAX_FAILING = 12
#: What a terminal takes as commands: whoever can send events must not steer the operator's.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plain(value: object) -> str:
    """Return what an event holds as text that neither the terminal nor rich takes for more than text."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def draw_stage_types(console: Console, summary: Mapping[str, Any]) -> None:
    """Draw a line per stage type: how many, how long, how many failed."""
    table = Table(title=f"Stages of {plain(summary['run_id'])}", title_justify="left")
    table.add_column("stage type")
    for name in ("count", "mean ms", "p50 ms", "p95 ms", "errors"):
        table.add_column(name, justify="right")
    for kind, totals in summary["stage_types"].items():
        errors = totals["errors"]
        table.add_row(
            plain(kind),
            f"{totals['count']:,}",
            _ms(totals["mean_ms"]),
            _ms(totals["p50_ms"]),
            _ms(totals["p95_ms"]),
            f"[red]{errors:,}[/]" if errors else "0",
        )
    console.print(table)
    missing = summary["missing_required_stage_types"]
    if missing:
        console.print(f"[yellow]Missing required stages:[/] {', '.join(missing)}")


def slowest_tree(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the stages below the slowest root, for runs that were recorded without trace ids."""
    trees: list[list[Mapping[str, Any]]] = []
    for depth, event in _tree(events):
        if depth == 0:
            trees.append([])
        trees[-1].append(event)
    return max(trees, key=lambda tree: (max(event["duration_ms"] or 0.0 for event in tree), len(tree)))


def draw_waterfall(console: Console, events: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw stages as a tree, each with a bar where it lies in time; `title` says of what."""
    spans = [(_start(event), event) for event in events]
    starts = [start for start, _ in spans if start is not None]
    first = min(starts, default=0.0)
    ends = [start + (event["duration_ms"] or 0.0) for start, event in spans if start is not None]
    whole = max(max(ends, default=0.0) - first, 0.001)

    table = Table(title=plain(title), title_justify="left")
    width = max(_MIN_BAR, min(_MAX_BAR, console.width - _BESIDE_BAR))
    table.add_column("stage", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column(f"0 to {whole:,.2f} ms" if starts else "no times recorded", no_wrap=True)
    table.add_column("outcome", min_width=8)
    for depth, event in _tree(events):
        start = _start(event)
        bar = "" if start is None else _bar(width, (start - first) / whole, (event["duration_ms"] or 0.0) / whole)
        name = f" {event['stage_name']}" if event["stage_name"] else ""
        outcome = event["status"]
        if outcome != "success":
            error = event["attributes"].get("error")
            kind = error.get("type", "") if isinstance(error, Mapping) else ""
            outcome = f"[red]{plain(outcome)}[/] {plain(str(kind))}"
        table.add_row(
            "  " * depth + plain(event["stage_type"]) + f"[dim]{plain(name)}[/]",
            _ms(event["duration_ms"]),
            bar,
            outcome,
        )
    console.print(table)


def _start(event: Mapping[str, Any]) -> float | None:
    """Return when a stage began, or at least when it was over, in Unix milliseconds."""
    known = event["started_at"] or event["finished_at"]
    return datetime.fromisoformat(known).timestamp() * 1000 if known else None


def _bar(width: int, offset: float, length: float) -> str:
    before = min(round(offset * width), width - 1)
    filled = max(1, min(round(length * width), width - before))
    return " " * before + ("█" * filled if length else "│")


def _tree(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Yield the stages with their depth, parents first, siblings by their start."""
    known = {event["stage_id"] for event in events}
    below: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        parent = event["parent_stage_id"]
        below[parent if parent in known and parent != event["stage_id"] else None].append(event)
    seen: set[str] = set()
    # After the roots everything else: stages that are each other's parents hang below none.
    waiting = [(0, event) for event in (*_by_start(below[None]), *_by_start(events))]
    while waiting:
        depth, event = waiting.pop(0)
        if event["stage_id"] in seen:
            continue
        seen.add(event["stage_id"])
        yield depth, event
        waiting[:0] = [(depth + 1, child) for child in _by_start(below[event["stage_id"]])]


def _by_start(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(events, key=lambda event: _start(event) or float("-inf"))


def draw_failing(console: Console, report: Mapping[str, Any]) -> None:
    """Draw a line per metric that fails somewhere: in how many stages, and how badly."""
    failing = report["failing_metrics"]
    if not failing:
        console.print("[green]Every metric holds its threshold.[/]")
        return
    table = Table(title="Failing metrics", title_justify="left")
    table.add_column("metric")
    for name in ("failing", "of", "threshold", "worst"):
        table.add_column(name, justify="right")
    for metric in failing[:_MAX_FAILING]:
        table.add_row(
            plain(metric["metric_name"]),
            f"{metric['failing']:,}",
            f"{metric['of']:,}",
            f"{metric['threshold']:g}",
            f"{metric['worst']:,.0f}" if abs(metric["worst"]) >= 1_000 else f"{metric['worst']:.4g}",
        )
    console.print(table)
    if len(failing) > _MAX_FAILING:
        console.print(f"... and {len(failing) - _MAX_FAILING} more", highlight=False)


def draw_recommendations(console: Console, report: Mapping[str, Any]) -> None:
    """Draw what to do, the most urgent first."""
    if report["recommendations"]:
        console.print("[bold]Recommendations[/]")
        for text in report["recommendations"]:
            console.print(Padding(f"• {plain(text)}", (0, 0, 0, 2)), highlight=False)


def _age(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _holder(kept: Kept) -> str:
    return {True: "in use", False: "left over", None: "not known: no locks"}[kept.in_use]


def draw_spool_status(console: Console, destination: Destination) -> None:
    """Draw what waits for one destination, and since when."""
    segments = destination.segments()
    held = [_holder(kept) for kept in segments]
    table = Table(title=plain(destination.address), title_justify="left", show_header=False)
    table.add_row("folder", plain(destination.folder))
    table.add_row("events", f"{sum(kept.count() for kept in segments):,}")
    table.add_row("on disk", decimal(sum(kept.size for kept in segments)))
    table.add_row("oldest", _age(segments[0].age_s()) if segments else "-")
    for holder in ("in use", "left over", "not known: no locks"):
        if holder in held or not holder.startswith("not known"):
            table.add_row(f"segments {holder}", f"{held.count(holder):,}")
    table.add_row("dead letter", f"{sum(1 for _ in destination.letters()):,}")
    console.print(table)


def draw_spool_segments(console: Console, destination: Destination) -> None:
    """Draw a line per segment."""
    table = Table(title=plain(destination.address), title_justify="left")
    for name in ("begun", "age", "owner", "held"):
        # On a narrow terminal it is the owner that is cut, never a count.
        table.add_column(name, no_wrap=name != "owner", overflow="ellipsis")
    for name in ("events", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for kept in destination.segments():
        begun = datetime.fromtimestamp(kept.begun_ms / 1000).astimezone()
        table.add_row(
            f"{begun:%Y-%m-%d %H:%M:%S}",
            _age(kept.age_s()),
            kept.owner,
            _holder(kept),
            f"{kept.count():,}",
            decimal(kept.size),
        )
    console.print(table)


def draw_replayed(console: Console, destination: Destination, result: Replayed) -> None:
    """Say what became of what was to be delivered."""
    console.print(
        f"{plain(destination.address)}: {result.stored:,} events stored, {result.refused:,} refused, "
        f"{result.left:,} left",
        highlight=False,
        soft_wrap=True,
    )
    if result.refused or result.damaged:
        damaged = f", and {result.damaged:,} damaged lines" if result.damaged else ""
        console.print(f"  what was refused{damaged} is in {plain(destination.dead_letter)}", highlight=False)
    if result.in_use:
        console.print(f"  {result.in_use:,} segments are in use: running services deliver them", highlight=False)
    if result.failure:
        console.print(f"  [red]{plain(result.failure)}[/]", highlight=False, soft_wrap=True)


def draw_settings(console: Console, settings: Iterable[Setting]) -> None:
    """Draw the settings in force, and where each comes from."""
    table = Table(title="Settings", title_justify="left")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for setting in settings:
        style = "dim" if setting.source == "default" else None
        table.add_row(setting.name, plain(setting.value), plain(setting.source), style=style)
    console.print(table)


def draw_finding(console: Console, finding: Finding) -> None:
    """Say what a check found, and what to do."""
    mark = {"ok": "[green]OK     [/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}[finding.state]
    console.print(f"{mark} {finding.what}: {plain(finding.text)}", highlight=False, soft_wrap=True)
    if finding.advice:
        console.print(f"        -> {plain(finding.advice)}", highlight=False, soft_wrap=True)
