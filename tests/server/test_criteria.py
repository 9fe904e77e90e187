"""Files that say what a run is judged by: read whole, refused with the place, seen in the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import ConfigurationError, StageEvent
from evalvault_sdk.server.criteria import Criteria
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS
from evalvault_sdk.server.settings import ServerSettings
from tests.support import DATA, live_server

RULE = {"stage_type": "Vector_Search", "attribute": "index.probes", "name": "probes", "threshold": 32}


def criteria(folder: Path, name: str, content: str, **settings: Any) -> Criteria:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    option = "rules" if name.startswith("rules") else path.stem
    return Criteria.of(ServerSettings(**{option: str(path), **settings}))


def scores(found: Criteria, stage_type: str, **fields: Any) -> dict[str, tuple[float, float | None, bool | None]]:
    event = StageEvent(run_id="r", stage_type=stage_type, stage_id="s", **fields)
    return {metric.metric_name: (metric.score, metric.threshold, metric.passed) for metric in found.metrics_of(event)}


def test_without_files_evalvaults_thresholds_hold_and_its_profiles_change_some() -> None:
    assert Criteria.of(ServerSettings()).thresholds == DEFAULT_THRESHOLDS
    for profile, latency_ms in (("dev", 4000.0), ("prod", 2000.0)):
        found = Criteria.of(ServerSettings(profile=profile)).thresholds
        assert (found["output.latency_ms"], set(found) >= set(DEFAULT_THRESHOLDS)) == (latency_ms, True)


def test_evalvaults_own_file_of_thresholds_is_read(tmp_path: Path) -> None:
    content = (DATA / "stage_metric_thresholds.json").read_text(encoding="utf-8")
    for profile in (None, *json.loads(content)["profiles"]):
        assert criteria(tmp_path, "thresholds.json", content, profile=profile).thresholds


def test_a_profile_of_the_file_changes_its_defaults(tmp_path: Path) -> None:
    content = json.dumps({"default": {"x.a": 1, "x.b": 2}, "profiles": {"night": {"x.b": 9}}})
    assert criteria(tmp_path, "thresholds.json", content).thresholds == {"x.a": 1.0, "x.b": 2.0}
    night = criteria(tmp_path, "thresholds.json", content, profile="night")
    assert night.thresholds == {"x.a": 1.0, "x.b": 9.0}
    assert scores(night, "x", attributes={"b": 9})["x.b"] == (9.0, 9.0, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is no JSON"),
        ("[]", "must hold an object at its top"),
        ("[" * 100_000, "is no JSON"),
        ('{"default": []}', "default must be an object of metric names and numbers"),
        ('{"default": {"a": "1"}}', "default: a must be a number"),
        ('{"default": {"a": true}}', "default: a must be a number"),
        ('{"default": {"a": NaN}}', "default: a must be a number"),
        ('{"default": {"a": 1e999}}', "default: a must be a number"),
        ('{"profiles": []}', "profiles must be an object"),
        ('{"profiles": {"dev": {"a": null}}}', "profiles.dev: a must be a number"),
        ('{"defaults": {}}', "'defaults' is not known"),
    ],
)
def test_a_wrong_file_of_thresholds_is_named_with_the_place(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        criteria(tmp_path, "thresholds.json", content)
    assert "thresholds.json" in str(raised.value)
    assert words in str(raised.value)


def test_a_profile_that_is_not_in_the_file_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for content, there_are in (('{"profiles": {"night": {}}}', "night"), ("{}", "none")):
        with pytest.raises(ConfigurationError, match=f"must be one of: {there_are}"):
            criteria(tmp_path, "thresholds.json", content, profile="prod")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"q1": "d1"}', "q1 must be a list of document ids"),
        ('{"q1": [1]}', "q1 must be a list of document ids"),
        ("null", "must hold an object"),
    ],
)
def test_a_wrong_map_of_relevant_documents_is_named_with_the_place(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        criteria(tmp_path, "relevance.json", content)
    assert words in str(raised.value)


@pytest.mark.parametrize("form", ["toml", "yaml", "yml", "json"])
def test_a_rule_makes_a_metric_in_whichever_form_it_is_written(tmp_path: Path, form: str) -> None:
    if form == "toml":
        content = "[[rule]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in RULE.items())
    else:
        content = json.dumps({"rule": [RULE]})  # JSON is YAML
    found = criteria(tmp_path, f"rules.{form}", "\ufeff" + content)
    assert scores(found, "vector_search", attributes={"index": {"probes": 40}})["vector_search.probes"] == (
        40,
        32,
        True,
    )
    assert "other.probes" not in scores(found, "other", attributes={"index": {"probes": 40}})
    odd_values: list[dict[str, Any]] = [{"index": 7}, {"index": {"probes": "many"}}, {"index": []}, {}]
    for odd in odd_values:
        assert "vector_search.probes" not in scores(found, "vector_search", attributes=odd)


def test_a_rule_may_be_a_ceiling_and_may_be_for_every_stage_type(tmp_path: Path) -> None:
    rule = {**RULE, "stage_type": "*", "direction": "max"}
    found = criteria(tmp_path, "rules.json", json.dumps({"rule": [rule]}))
    for stage_type in ("a", "retrieval"):
        assert scores(found, stage_type, attributes={"index": {"probes": 40}})[f"{stage_type}.probes"] == (
            40,
            32,
            False,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attribute": None}, "rule 1 needs attribute, a text"),
        ({"name": " "}, "rule 1 needs name, a text"),
        ({"stage_type": 3}, "rule 1 needs stage_type, a text"),
        ({"threshold": "32"}, "rule 1: threshold must be a number"),
        ({"threshold": True}, "rule 1: threshold must be a number"),
        ({"direction": "up"}, "rule 1: direction must be min (a floor) or max (a ceiling)"),
        ({"treshold": 3}, "rule 1 has an unknown key 'treshold'"),
        ({"name": "latency_ms"}, "is a metric already"),
        ({"stage_type": "Retrieval", "name": "recall_at_k"}, "retrieval.recall_at_k is a metric already"),
        ({"stage_type": "*", "name": "keep_rate"}, "*.keep_rate is a metric already"),
    ],
)
def test_a_wrong_rule_is_named_with_the_place(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        criteria(tmp_path, "rules.json", json.dumps({"rule": [{**RULE, **change}]}))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rules.toml", "[[rule]\n", "is no TOML"),
        ("rules.yaml", "rule: [", "is no YAML"),
        ("rules.yaml", "rule: !!python/object/apply:os.system ['true']", "is no YAML"),
        ("rules.toml", "", "has no [[rule]]"),
        ("rules.json", '{"rule": {}}', "has no [[rule]]"),
        ("rules.json", '{"rule": [3]}', "rule 1 must have"),
        ("rules.json", json.dumps({"rule": [RULE, RULE]}), "rule 2 makes vector_search.probes a second time"),
        ("rules.ini", "", "must be a .json, .toml, .yaml or .yml file"),
    ],
)
def test_a_wrong_file_of_rules_is_named_with_the_place(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        criteria(tmp_path, name, content)
    assert name in str(raised.value)
    assert words in str(raised.value)


def test_the_files_are_seen_in_the_servers_answers(tmp_path: Path) -> None:
    relevance, rules = tmp_path / "relevance.json", tmp_path / "rules.yaml"
    relevance.write_text(json.dumps({"q1": ["d1", "d9"]}))
    rules.write_text(json.dumps({"rule": [RULE]}))
    arguments = ("--relevance", str(relevance), "--rules", str(rules), "--profile", "prod")
    with live_server(tmp_path / "x.db", *arguments) as server:
        stages: list[dict[str, Any]] = [
            {"stage_type": "retrieval", "attributes": {"doc_ids": ["d1", "d2"]}, "metadata": {"test_case_id": "q1"}},
            {"stage_type": "vector_search", "attributes": {"index": {"probes": 8}}},
            {"stage_type": "output", "duration_ms": 2500},
        ]
        server.post({"events": [{"run_id": "r", **stage} for stage in stages]})
        found = {metric["metric_name"]: metric for metric in server.get("metrics/r")["metrics"]}
    assert (found["retrieval.recall_at_k"]["score"], found["retrieval.precision_at_k"]["score"]) == (0.5, 0.5)
    assert (found["vector_search.probes"]["threshold"], found["vector_search.probes"]["passed"]) == (32, False)
    assert (found["output.latency_ms"]["threshold"], found["output.latency_ms"]["passed"]) == (2000, False)
