"""
A span of LlamaIndex: what is known of it while it, or its stream, goes on.

In:   what `Spans` learns of it.
Out:  the same, for what begins inside it.
Pure. Whoever writes into one is in the thread or task that the span runs in, or that reads its stream.
"""

from __future__ import annotations

from typing import Any

from evalvault_sdk.integrations.llama_index.call import Call
from evalvault_sdk.integrations.llama_index.components import Component

#: The dispatcher makes a span's id of a name and a UUID.
_UUID_LENGTH = len("-00000000-0000-0000-0000-000000000000")


class Span:
    """What is known of a span: what it is, and what is around it. One without a stage is as the one around it."""

    __slots__ = (
        "answer",
        "call",
        "component",
        "failures",
        "id",
        "instance",
        "is_waiting",
        "method",
        "name",
        "parent",
        "request",
        "sources",
        "stage_id",
        "tags",
        "task",
        "template",
    )

    def __init__(self, id_: str, parent: Span | None) -> None:
        self.id = id_
        #: The qualified name of the function, and its last part.
        self.name = id_[:-_UUID_LENGTH]
        self.method = self.name.rpartition(".")[2]
        self.parent = parent
        #: The span whose stage is that of what begins here.
        self.stage_id: str | None = None if parent is None else parent.stage_id
        self.component: Component | None = None if parent is None else parent.component
        self.instance: int | None = None if parent is None else parent.instance
        self.call: Call | None = None if parent is None else parent.call
        #: The template of the prompt that a model call in it is made with.
        self.template: Any = None if parent is None else parent.template
        #: What the spans of one request have in common: whether its prompt was recorded.
        self.request: dict[str, bool] = {} if parent is None else parent.request
        #: What the program says of it and of all that runs in it: metadata.
        self.tags: dict[str, Any] | None = None
        #: Whether its stage ends with its stream.
        self.is_waiting = False
        #: The ids of the nodes that were found in it, or were given to it.
        self.sources: list[str] | None = None
        #: The last answer of a model in it.
        self.answer: Any = None
        #: Of a step of a workflow: its name, and the event it was given.
        self.task: tuple[str, int] | None = None
        #: Of the run of a workflow: how often each step failed that did not succeed since, and with what.
        self.failures: dict[tuple[str, int], tuple[int, BaseException]] = {}

    @property
    def has_stage(self) -> bool:
        """Whether it has a stage of its own."""
        return self.stage_id == self.id

    def is_inside(self, other: Span) -> bool:
        """Whether it is `other`, or in it."""
        span: Span | None = self
        while span is not None and span is not other:
            span = span.parent
        return span is other

    @property
    def enclosing(self) -> Span | None:
        """The innermost span around it that has a stage."""
        around = self.parent
        while around is not None and not around.has_stage:
            around = around.parent
        return around

    @property
    def known_sources(self) -> list[str] | None:
        """The ids of the nodes that the innermost component with any was given, or found."""
        around: Span | None = self
        while around is not None and around.sources is None:
            around = around.parent
        return None if around is None else around.sources
