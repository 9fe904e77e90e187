from __future__ import annotations

import os
import random
import re
import uuid

import pytest

from evalvault_sdk.ids import new_stage_id, span_id_of, trace_id_of


def test_a_stage_id_is_a_uuid_version_7_that_tells_its_time() -> None:
    made = uuid.UUID(new_stage_id(1_767_780_000_123_456_789))
    assert made.version == 7
    assert made.variant == uuid.RFC_4122
    assert made.int >> 80 == 1_767_780_000_123


def test_ids_sort_by_time_within_a_millisecond() -> None:
    start = 1_767_780_000_000_000_000
    ids = [new_stage_id(start + nanoseconds) for nanoseconds in range(0, 2_000_000, 1000)]
    assert ids == sorted(ids)


def test_ids_do_not_repeat() -> None:
    assert len({new_stage_id(0) for _ in range(100_000)}) == 100_000


def test_a_program_that_seeds_random_does_not_repeat_its_ids() -> None:
    random.seed(42)
    first = new_stage_id(0)
    random.seed(42)
    assert new_stage_id(0) != first


def test_trace_and_span_ids_are_those_of_w3c_trace_context() -> None:
    stage_id = new_stage_id()
    assert re.fullmatch("[0-9a-f]{16}", span_id_of(stage_id))
    assert re.fullmatch("[0-9a-f]{32}", trace_id_of(stage_id))
    assert int(span_id_of(stage_id), 16) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_repeat_its_parents_ids() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, new_stage_id(0).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100).decode() != new_stage_id(0)
    os.close(reading)
    os.close(writing)
