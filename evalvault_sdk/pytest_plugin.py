"""
The fixture `evalvault_stages` for pytest, which finds this module by its entry point.

In:   a test that names the fixture.
Out:  what is recorded while the test runs (`evalvault_sdk.testing`), instead of having it delivered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from evalvault_sdk.testing import RecordedStages


@pytest.fixture
def evalvault_stages() -> Iterator[RecordedStages]:
    """Stages recorded by the package's functions, and by the tracers given to `evalvault_stages.watch()`."""
    from evalvault_sdk.testing import record_stages  # not before a test asks for it

    with record_stages() as recorded:
        yield recorded
