"""
Sum up a run: what it consists of, how long its stages take, which required ones are missing.

In:   the totals that the store computed.
Out:  the summary object of the contract ("Debug report"), and the longer one with percentiles and errors.
Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evalvault_sdk.events import REQUIRED_STAGE_TYPES
from evalvault_sdk.server.store.base import RunTotals, StageTypeTotals


def summarize(run_id: str, totals: Sequence[StageTypeTotals]) -> dict[str, Any]:
    """Return `{run_id, total_events, stage_type_counts, stage_type_avg_durations, missing_required_stage_types}`."""
    seen = {total.stage_type for total in totals}
    return {
        "run_id": run_id,
        "total_events": sum(total.events for total in totals),
        "stage_type_counts": {total.stage_type: total.events for total in totals},
        "stage_type_avg_durations": {total.stage_type: total.mean_ms for total in totals if total.mean_ms is not None},
        "missing_required_stage_types": [kind for kind in REQUIRED_STAGE_TYPES if kind not in seen],
    }


def stage_types(totals: Sequence[StageTypeTotals]) -> dict[str, dict[str, Any]]:
    """Return, by stage type, counts, error rate, and mean and percentiles in milliseconds."""
    return {
        total.stage_type: {
            "count": total.events,
            "errors": total.errors,
            "error_rate": total.errors / total.events,
            "mean_ms": total.mean_ms,
            "p50_ms": total.p50_ms,
            "p95_ms": total.p95_ms,
            "p99_ms": total.p99_ms,
        }
        for total in totals
    }


def run_summary(run_id: str, totals: RunTotals) -> dict[str, Any]:
    """Return what a live run has instead of a row in EvalVault's `evaluation_runs`: what its events tell."""
    started_at, finished_at = totals.started_at, totals.finished_at
    known = started_at is not None and finished_at is not None
    return {
        "run_id": run_id,
        "started_at": started_at.isoformat() if started_at else None,
        "finished_at": finished_at.isoformat() if finished_at else None,
        "duration_seconds": (finished_at - started_at).total_seconds() if known else None,  # type: ignore[operator]
        "total_events": totals.events,
        "total_traces": totals.traces,
        "error_count": totals.errors,
        "slowest_trace_id": totals.slowest_trace_id,
    }
