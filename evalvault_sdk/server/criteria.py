"""
What a run is judged by: thresholds, relevant documents, rules for metrics of one's own.

In:   the files that the settings name.
Out:  `Criteria`, checked whole before the server starts; or a `ConfigurationError` that names the place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.files import read_config_file
from evalvault_sdk.server.metrics import (
    DEFAULT_THRESHOLDS,
    SPECIAL_METRICS,
    Measured,
    MetricRule,
    StageMetric,
    metrics_of,
)
from evalvault_sdk.server.settings import ServerSettings

#: EvalVault's own profiles: what differs from its defaults.
PROFILES: Mapping[str, Mapping[str, float]] = {
    "dev": {"output.latency_ms": 4000.0, "output.citation_count": 1.0},
    "prod": {"output.latency_ms": 2000.0, "output.citation_count": 2.0},
}


@attrs.frozen(kw_only=True)
class Criteria:
    """What metrics are computed with."""

    thresholds: Mapping[str, float] = DEFAULT_THRESHOLDS
    #: The ids of the relevant documents of each test case.
    relevance: Mapping[str, Collection[str]] = attrs.field(factory=dict)
    rules: Sequence[MetricRule] = ()

    @classmethod
    def of(cls, settings: ServerSettings) -> Criteria:
        """Read the files that `settings` name. Raises `ConfigurationError`."""
        return cls(
            thresholds=_read_thresholds(settings.thresholds, settings.profile),
            relevance=_read_relevance(settings.relevance) if settings.relevance else {},
            rules=_read_rules(settings.rules) if settings.rules else (),
        )

    def metrics_of(self, event: Measured) -> Iterator[StageMetric]:
        """Yield the metrics of one event."""
        return metrics_of(event, thresholds=self.thresholds, relevance=self.relevance, rules=self.rules)


def _read_thresholds(path: str | None, profile: str | None) -> Mapping[str, float]:
    if path is None:
        default, profiles = DEFAULT_THRESHOLDS, PROFILES
    else:
        content = read_config_file(path)
        default = _thresholds(content.get("default", {}), f"{path}: default")
        given = content.get("profiles", {})
        if not isinstance(given, dict):
            raise ConfigurationError(f"{path}: profiles must be an object of profiles")
        profiles = {name: _thresholds(values, f"{path}: profiles.{name}") for name, values in given.items()}
        unknown = sorted(set(content) - {"default", "profiles"})
        if unknown:
            raise ConfigurationError(f"{path}: {unknown[0]!r} is not known; there are default and profiles")
    if profile is None:
        return default
    if profile not in profiles:
        there_are = ", ".join(profiles) or "none"
        raise ConfigurationError(f"profile must be one of: {there_are} (EVALVAULT_SERVER_PROFILE or --profile)")
    return {**default, **profiles[profile]}


def _thresholds(values: Any, where: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where} must be an object of metric names and numbers")
    for name, value in values.items():
        if not _is_number(value):
            raise ConfigurationError(f"{where}: {name} must be a number")
    return {name: float(value) for name, value in values.items()}


def _read_relevance(path: str) -> dict[str, list[str]]:
    content = read_config_file(path)
    for test_case, documents in content.items():
        if not isinstance(documents, list) or not all(isinstance(document, str) for document in documents):
            raise ConfigurationError(f"{path}: {test_case} must be a list of document ids, which are texts")
    return content


def _read_rules(path: str) -> tuple[MetricRule, ...]:
    """
    Read a file of rules::

        [[rule]]
        stage_type = "vector_search"      # or "*"
        attribute = "index.probes"        # attributes["index"]["probes"]
        name = "probes"                   # the metric vector_search.probes
        threshold = 32                    # optional
        direction = "max"                 # at most that much; "min" is the default
    """
    entries = read_config_file(path).get("rule")
    if not isinstance(entries, list) or not entries:
        raise ConfigurationError(f"{path} has no [[rule]] (in YAML: a list under the key rule)")
    rules: dict[tuple[str, str], MetricRule] = {}
    for number, entry in enumerate(entries, start=1):
        rule = _read_rule(entry, f"{path}: rule {number}")
        if (rule.stage_type, rule.name) in rules:
            raise ConfigurationError(f"{path}: rule {number} makes {rule.stage_type}.{rule.name} a second time")
        rules[rule.stage_type, rule.name] = rule
    return tuple(rules.values())


def _read_rule(entry: Any, where: str) -> MetricRule:
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{where} must have stage_type, attribute and name")
    unknown = sorted(set(entry) - {field.name for field in attrs.fields(MetricRule)})
    if unknown:
        raise ConfigurationError(
            f"{where} has an unknown key {unknown[0]!r}: stage_type, attribute, name, threshold, direction are known"
        )
    texts = {}
    for key in ("stage_type", "attribute", "name"):
        text = entry.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"{where} needs {key}, a text")
        texts[key] = text.strip()
    texts["stage_type"] = texts["stage_type"].lower()
    threshold, direction = entry.get("threshold"), entry.get("direction", "min")
    if threshold is not None and not _is_number(threshold):
        raise ConfigurationError(f"{where}: threshold must be a number")
    if direction not in ("min", "max"):
        raise ConfigurationError(f"{where}: direction must be min (a floor) or max (a ceiling)")
    taken = SPECIAL_METRICS["*"] | (
        frozenset().union(*SPECIAL_METRICS.values())
        if texts["stage_type"] == "*"
        else SPECIAL_METRICS.get(texts["stage_type"], frozenset())
    )
    if texts["name"] in taken:
        raise ConfigurationError(
            f"{where}: {texts['stage_type']}.{texts['name']} is a metric already: give another name"
        )
    return MetricRule(**texts, threshold=None if threshold is None else float(threshold), direction=direction)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
