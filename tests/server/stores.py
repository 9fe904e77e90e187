"""What the tests of all stores share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from evalvault_sdk import StageEvent
from evalvault_sdk.server.store import Store

NOON = datetime(2026, 1, 7, 12, tzinfo=timezone.utc)


def now(store: Store) -> Any:
    """Ask a new snapshot one question; what it yields is listed before the snapshot ends."""

    class Ask:
        def __getattr__(self, question: str) -> Any:
            def ask(*values: Any, **named: Any) -> Any:
                with store.snapshot() as view:
                    answer = getattr(view, question)(*values, **named)
                    return list(answer) if isinstance(answer, Iterator) else answer

            return ask

    return Ask()


def event(number: int = 0, **fields: Any) -> StageEvent:
    return StageEvent(**{"run_id": "r", "stage_type": "x", "stage_id": f"s{number}", **fields})
