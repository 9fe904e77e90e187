"""
Bound what the spans of one request may cost, whatever they hold.

In:   what a decoder meets: spans, containers, nesting, texts.
Out:  `ApiError` 413 once there is too much of it, and where values are to be cut.
Pure. A body is bounded in bytes already, but two bytes of protobuf can become a hundred in memory.
"""

from __future__ import annotations

from evalvault_sdk.server.answers import too_large
from evalvault_sdk.server.settings import ServerSettings

#: Lists and maps in a value of an attribute. OpenTelemetry means them to be flat; protobuf itself ends at 100
#: messages, which are 33 maps.
MAX_DEPTH = 16
#: Bytes of one span in protobuf, where an empty attribute is two of them.
MAX_SPAN_BYTES = 4 << 20
#: An attribute in OTLP/JSON is two objects, where our own JSON has none; and the JSON in texts of attributes counts.
_CONTAINERS_FACTOR = 2
#: Values for each container that is allowed: a vector has many in one list, at two bytes each in protobuf.
_VALUES_FACTOR = 4


class Bounds:
    """What is left for one request."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_spans = self._spans_left = settings.max_events
        self._max_containers = self._containers_left = settings.max_containers * _CONTAINERS_FACTOR
        self._max_values = self._values_left = self._max_containers * _VALUES_FACTOR

    def look_over(self, body: bytes) -> None:
        """Count the brackets in a body before anything is parsed, be they its own or those of JSON in its texts."""
        if body.count(b"{") + body.count(b"[") > self._max_containers:
            raise self._too_many_containers()

    def span(self) -> None:
        """Count a span."""
        self._spans_left -= 1
        if self._spans_left < 0:
            raise too_large(
                f"a request may have {self._max_spans} spans: send smaller batches", limit_spans=self._max_spans
            )

    def container(self) -> None:
        """Count a list, a map, or what else is an object of its own in memory."""
        self._containers_left -= 1
        if self._containers_left < 0:
            raise self._too_many_containers()

    def values(self, count: int) -> None:
        """Count the values of a list or map."""
        self._values_left -= count
        if self._values_left < 0:
            raise too_large(f"a request may have {self._max_values} values", limit_values=self._max_values)

    def _too_many_containers(self) -> Exception:
        limit = self._max_containers
        return too_large(f"a request may have {limit} objects and lists", limit_containers=limit)


def is_too_deep(depth: int) -> bool:
    """Whether a list or map at this depth is to be replaced by `TOO_DEEP`."""
    return depth > MAX_DEPTH
