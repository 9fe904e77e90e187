"""The short form of the campaign in `tests.path.chaos`; the long one is `make soak`."""

from __future__ import annotations

from pathlib import Path

from tests.path.chaos import Campaign


def test_whatever_server_and_programs_suffer_nothing_recorded_is_lost_and_nothing_is_felt(tmp_path: Path) -> None:
    report = Campaign(tmp_path, seconds=11, seed=1).run()
    print(report)  # seen if it fails: the seed is in it
    assert not report.failures, report
    assert report.recorded > 500
