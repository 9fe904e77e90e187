"""
Tell which of LlamaIndex's spans are stages, and of which type.

In:   the object and the method that a span is of.
Out:  the kind of component; None for what is plumbing: text splitters, output parsers, programs.
Pure. Kinds are known by the names of LlamaIndex's base classes, which have stayed while their modules moved: nothing
of LlamaIndex is imported.
"""

from __future__ import annotations

import weakref
from typing import Any

import attrs


@attrs.frozen(kw_only=True, eq=False)
class Component:
    """A kind of component. Of its spans only those of `methods` are stages; the others are the way to them."""

    stage_type: str
    methods: frozenset[str] = frozenset()
    #: The names of LlamaIndex's base classes.
    classes: tuple[str, ...] = ()
    #: Whether a request may begin with it, which is then recorded as `input`.
    takes_requests: bool = False
    #: Whether a model call inside is a part of it, and no stage: the query it makes is the point, not the answer.
    absorbs_calls: bool = False
    #: Whether one inside another is the same call, on its way from one interface to another.
    is_one_call: bool = False


def _with_async(*names: str) -> frozenset[str]:
    return frozenset(names) | {f"_a{name[1:]}" if name[0] == "_" else f"a{name}" for name in names}


_CHAT = _with_async("chat", "stream_chat")

CHAT_ENGINE = Component(stage_type="chain", methods=_CHAT, classes=("BaseChatEngine",), takes_requests=True)
AGENT = Component(
    stage_type="agent",
    methods=_CHAT | {"run"},
    classes=("BaseWorkflowAgent", "AgentWorkflow", "BaseAgent"),
    takes_requests=True,
)
WORKFLOW = Component(
    stage_type="chain", methods=frozenset({"run"}), classes=("Workflow", "QueryPipeline"), takes_requests=True
)
RETRIEVER = Component(
    stage_type="retrieval",
    methods=_with_async("retrieve"),
    classes=("BaseRetriever", "BaseImageRetriever"),
    takes_requests=True,
)
RERANKER = Component(
    stage_type="rerank",
    methods=_with_async("postprocess_nodes", "_postprocess_nodes"),
    classes=("BaseNodePostprocessor",),
    absorbs_calls=True,
)
SYNTHESIZER = Component(stage_type="chain", methods=_with_async("synthesize"), classes=("BaseSynthesizer",))
MODEL = Component(
    stage_type="output",
    methods=_CHAT | _with_async("complete", "stream_complete"),
    classes=("BaseLLM", "MultiModalLLM"),
    is_one_call=True,
)
EMBEDDING = Component(
    stage_type="embedding",
    methods=_with_async("get_query_embedding", "get_text_embedding", "get_text_embedding_batch"),
    classes=("BaseEmbedding", "BaseSparseEmbedding"),
    is_one_call=True,
)
TOOL = Component(stage_type="tool", methods=_with_async("call") | {"__call__"}, classes=("BaseTool",))
#: A step of a workflow, or a function of the program's own under `@dispatcher.span`.
FUNCTION = Component(stage_type="chain")

_COMPONENTS = (
    CHAT_ENGINE,
    AGENT,
    WORKFLOW,
    RETRIEVER,
    RERANKER,
    SYNTHESIZER,
    MODEL,
    EMBEDDING,
    TOOL,
    Component(stage_type="chain", methods=_with_async("query"), classes=("BaseQueryEngine",), takes_requests=True),
    Component(
        stage_type="query_rewrite",
        methods=_with_async("generate", "_run"),
        classes=("BaseQuestionGenerator", "BaseQueryTransform"),
        absorbs_calls=True,
    ),
    Component(stage_type="chain", methods=_with_async("_select"), classes=("BaseSelector",), absorbs_calls=True),
    Component(stage_type="chain", methods=_with_async("run"), classes=("IngestionPipeline",)),
)
_BY_CLASS = {name: component for component in _COMPONENTS for name in component.classes}
_PACKAGES = ("llama_index", "workflows")
#: Functions and steps of LlamaIndex's own, which have no object: by the first part of their qualified name.
_MACHINERY = frozenset(
    {
        *("BaseWorkflowAgent", "AgentWorkflow", "FunctionAgent", "ReActAgent", "CodeActAgent"),
        *("Workflow", "run_jobs", "asyncio_run"),
    }
)

_known: weakref.WeakKeyDictionary[type, Component | None] = weakref.WeakKeyDictionary()


def component_of(instance: Any) -> Component | None:
    """Return the kind of component that an object is."""
    kind = type(instance)
    try:
        return _known[kind]
    except KeyError:
        component = _known[kind] = _found(kind)
        return component


def _found(kind: type) -> Component | None:
    for base in kind.__mro__:
        if _is_of_llama_index(base) and base.__name__ in _BY_CLASS:
            return _BY_CLASS[base.__name__]
    return None


def is_own_function(instance: Any, name: str, is_step: bool) -> bool:
    """Whether a span is of a function, or of a step of a workflow, that is the program's own."""
    if instance is None:
        return name.partition(".")[0] not in _MACHINERY
    kind = type(instance)
    if is_step:
        method = name.rpartition(".")[2]
        kind = next((base for base in kind.__mro__ if method in vars(base)), kind)
        return not _is_of_llama_index(kind)
    return not any(map(_is_of_llama_index, kind.__mro__))


def _is_of_llama_index(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _PACKAGES
