"""What tests of integrations need: a tracer, and what it records."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.testing import RecordedStages, record_stages


@pytest.fixture
def tracer() -> Iterator[StageTracer]:
    with StageTracer("r", "http://127.0.0.1:1", durability="memory", shutdown_timeout_s=0.1) as made:
        yield made


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages
