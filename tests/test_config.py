from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from evalvault_sdk import ConfigurationError, Settings, StageTracer
from evalvault_sdk.config import PERSONAL_DATA, SettingArguments


def test_an_argument_wins_over_its_variable_and_the_variable_over_the_default() -> None:
    environ = {"EVALVAULT_BATCH_EVENTS": "10", "EVALVAULT_FLUSH_INTERVAL_S": "0.5", "EVALVAULT_RUN_ID": "from-env"}
    settings = Settings.resolve(environ, batch_events=20)
    assert (settings.run_id, settings.batch_events, settings.flush_interval_s) == ("from-env", 20, 0.5)
    assert settings.api_url == "http://localhost:8000"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"run_id": ""}, "EVALVAULT_RUN_ID"),
        ({"run_id": 7}, "run_id is required"),
        ({"api_url": "localhost:8000"}, "api_url must be an http:// or https:// address"),
        ({"api_url": "ftp://x"}, "api_url"),
        ({"api_url": "http://user:secret@host"}, "token="),
        ({"token": "two\nlines"}, "one line"),
        ({"api_url": "http://h/?a=1"}, "without ? or #"),
        ({"api_url": "http://foo bar"}, "api_url"),
        ({"headers": {"X": 1}}, "headers must be a dict"),
        ({"headers": {"X": "한글"}}, "plain ASCII"),
        ({"headers": "abc"}, "headers must be a dict"),
        ({"proxies": "http://p"}, "proxies must be a dict"),
        ({"cert": 5}, "cert must be the path"),
        ({"verify": ""}, "verify must be True, False, or the path"),
        ({"enabled": 1}, "enabled must be True or False"),
        ({"batch_events": 0}, "batch_events must be a whole number of at least 1"),
        ({"batch_events": 1.5}, "batch_events must be a whole number"),
        ({"flush_interval_s": float("inf")}, "flush_interval_s must be a number of seconds"),
        ({"flush_interval_s": float("nan")}, "flush_interval_s must be a number of seconds"),
        ({"retry_max_s": 1e12}, "from 0.001 to 86400"),
        ({"compression": "zip"}, "gzip, zstd, none"),
        ({"batch_evnts": 5}, "did you mean 'batch_events'"),
        ({"enabled": "yes"}, "enabled"),
        ({"durability": "disk"}, "memory, spool, journal"),
        ({"queue_policy": "spill"}, "spool, drop_oldest, drop_newest, block"),
        ({"spool_policy": "spool"}, "drop_oldest, drop_newest"),
        ({"spool_max_bytes": 1000}, "spool_max_bytes must be a whole number of at least 65536"),
        ({"spool_max_age_s": 1}, "from 60 to 315360000"),
        ({"spool_dir": " "}, "spool_dir must be the path"),
        ({"on_drop": "print"}, "on_drop must be a function"),
        ({"handle_sigterm": 1}, "handle_sigterm must be True or False"),
    ],
)
def test_a_wrong_setting_raises_at_construction_and_says_which(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StageTracer(**{"run_id": "r", **given})
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("EVALVAULT_BATCH_EVENTS", "many", "must be a whole number"),
        ("EVALVAULT_BATCH_EVENTS", "0", "must be a whole number of at least 1"),
        ("EVALVAULT_FLUSH_INTERVAL_S", "soon", "must be a number"),
        ("EVALVAULT_SDK_DISABLED", "perhaps", "1 or 0"),
        ("EVALVAULT_API_URL", "localhost", "http://"),
        ("EVALVAULT_DURABILITY", "Journal", "memory, spool, journal"),
        ("EVALVAULT_SPOOL_MAX_BYTES", "512M", "must be a whole number"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.resolve({variable: value}, run_id="r")
    assert variable in str(caught.value)
    assert words in str(caught.value)


def test_a_path_may_be_a_path() -> None:
    assert Settings.resolve({}, run_id="r", verify=Path("/etc/ca.pem")).verify == "/etc/ca.pem"


def test_the_spool_s_folder_stays_where_it_is_when_the_program_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Settings.resolve({}, run_id="r", spool_dir="here").spool_dir == str(tmp_path / "here")
    assert Settings.resolve({"EVALVAULT_SPOOL_DIR": "~/s"}, run_id="r").spool_dir == "/home/somebody/s"


def test_what_is_switched_off_needs_no_run() -> None:
    assert Settings.resolve({"EVALVAULT_SDK_DISABLED": "1"}).enabled is False


def test_type_checkers_know_every_setting() -> None:
    named = {field.name for field in attrs.fields(Settings)} - {"run_id", "api_url"}
    assert set(SettingArguments.__annotations__) == named


def test_secrets_are_not_shown() -> None:
    settings = Settings(
        run_id="r", token="s3cret", proxies={"https": "http://u:s3cret@proxy"}, headers={"X-Key": "s3cret"}
    )
    assert "s3cret" not in repr(settings)
    assert "X-Key" in repr(settings)
    with StageTracer("r", token="s3cret") as tracer:
        assert "s3cret" not in repr(tracer)


def test_the_off_switch_of_the_operator_wins_over_the_code() -> None:
    assert Settings.resolve({"EVALVAULT_SDK_DISABLED": "1"}, run_id="r", enabled=True).enabled is False
    assert Settings.resolve({"EVALVAULT_SDK_DISABLED": "0"}, run_id="r", enabled=False).enabled is False
    assert Settings.resolve({"EVALVAULT_SDK_DISABLED": "0"}, run_id="r").enabled is True


def test_a_url_may_end_with_a_slash_and_none_means_not_given() -> None:
    assert Settings.resolve({}, run_id="r", api_url="http://host/path/", token=None).api_url == "http://host/path"


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("sample_rate", 1.5, "sample_rate must be a number from 0"),
        ("sample_rate", True, "sample_rate must be a number from 0"),
        ("sample_rate", float("nan"), "sample_rate must be a number from 0"),
        ("sample_keep_slow_ms", -1, "sample_keep_slow_ms must be a number of milliseconds"),
        ("content", "some", "content must be one of: all, none"),
        ("personal_data", ["e-mail"], "personal_data must be some of: email, phone, card"),
        ("personal_data", 5, "personal_data must be some of"),
        ("mask", "hide", "mask must be a function"),
        ("payload_store", "folder", r"payload_store must be an object with the method put\(\)"),
        ("max_attribute_bytes", 10, "max_attribute_bytes must be a whole number of at least 1024"),
        ("max_event_bytes", 1, "max_event_bytes must be a whole number of at least 4096"),
        ("max_depth", 0, "max_depth must be a whole number from 1 to 200"),
        ("max_items", 1, "max_items must be a whole number of at least 10"),
        ("traceback_frames", -1, "traceback_frames must be a whole number from 0 to 1000"),
        ("console", "yes", "console must be True or False"),
        ("scrub_secrets", 1, "scrub_secrets must be True or False"),
    ],
)
def test_a_wrong_setting_of_capture_says_which_and_what_it_may_be(setting: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        StageTracer("run", **{setting: value})


def test_settings_of_capture_come_from_variables_too() -> None:
    environ = {
        "EVALVAULT_SAMPLE_RATE": "0.25",
        "EVALVAULT_PERSONAL_DATA": "email, Phone",
        "EVALVAULT_CONTENT": "none",
        "EVALVAULT_SAMPLE_KEEP_SLOW_MS": "1500",
        "EVALVAULT_SCRUB_SECRETS": "off",
        "EVALVAULT_TRACEBACK_FRAMES": "5",
        "EVALVAULT_CONSOLE": "1",
    }
    settings = Settings.resolve(environ, run_id="r")
    assert (settings.sample_rate, settings.personal_data, settings.content) == (0.25, ("email", "phone"), "none")
    assert (settings.sample_keep_slow_ms, settings.scrub_secrets) == (1500, False)
    assert (settings.traceback_frames, settings.console) == (5, True)
    every_kind = Settings.resolve({"EVALVAULT_PERSONAL_DATA": "all"}, run_id="r").personal_data
    assert every_kind == PERSONAL_DATA == Settings.resolve({}, run_id="r", personal_data="all").personal_data
    with pytest.raises(ConfigurationError, match="from the variable EVALVAULT_PERSONAL_DATA"):
        Settings.resolve({"EVALVAULT_PERSONAL_DATA": "email;phone"}, run_id="r")


def test_tracers_that_differ_in_capture_alone_share_a_worker(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    plain = StageTracer("a", file=file)
    masked = StageTracer("b", file=file, mask=lambda content: content, sample_rate=0.5, personal_data=["email"])
    assert plain._outbox.worker is masked._outbox.worker
    plain.shutdown()
    masked.shutdown()
