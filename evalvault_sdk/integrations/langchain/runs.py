"""
Make stages of LangChain's runs: which become one, of which type, and what is known of them only later.

In:   what the callbacks are told: a run began or ended, below which other run, and its tags and metadata.
Out:  observed stages, and beside them the `input` of a request and the `system_prompt` of models that get one.
In the program's threads and tasks, never waiting. What never ends is bounded in number and given up.

The types are those that EvalVault's metrics know; where LangChain has none of them in mind, they are:

* `chain`, under the name of the function, node or graph; `agent`, `tool` and `parser` likewise;
* `output` for a model, but `query_rewrite` if it runs in a retriever that has not found anything yet, or if a retriever
  then searches for what it wrote. For this the last models' stages of a request are held until it ends, or until
  there are more of them. In a stage that serves something else (`rerank`, `safety_check` ...) a model is an `llm`.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from uuid import UUID

import attrs

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import Scope
from evalvault_sdk.capture.draft import iso_time
from evalvault_sdk.capture.observed import ObservedStages
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.errors import cancellation
from evalvault_sdk.integrations.langchain.current import current_run_id

Kind = Literal["chain", "prompt", "parser", "model", "retriever", "tool"]

#: The key of a run's metadata that says of which type its stage is.
STAGE_TYPE = "evalvault_stage_type"

_TYPES: Mapping[Kind, str] = {
    "chain": "chain",
    "prompt": "system_prompt",
    "parser": "parser",
    "model": "output",
    "retriever": "retrieval",
    "tool": "tool",
}
#: A model that runs in one of these does not answer the request.
_PURPOSES = frozenset(
    {"query_rewrite", "retrieval", "rerank", "language_detection", "intent", "safety_check", "answer_validation"}
)
#: Types that a user may give to what the answer is made in.
_AROUND_ANSWERS = frozenset({"chain", "agent", "tool", "parser", "output"})
#: What LangChain's own glue is called: sequences, parallels, lambdas without a name.
_PLUMBING = re.compile(r"Runnable[A-Z]\w*(<.*>)?|Channel(Read|Write)<.*", re.DOTALL)
_HIDDEN = "langsmith:hidden"
_ATTEMPT = "retry:attempt:"
#: Tags and metadata with which LangChain tells its own tools where a run is.
_OWN_TAGS = ("seq:step:", "map:key:", "graph:step:", "condition:", "branch:", "langsmith:", _ATTEMPT)
_OWN_METADATA = ("ls_", "lc_", "langgraph_", "__", "checkpoint_", STAGE_TYPE)
_KEPT_METADATA = {
    "langgraph_node": "langgraph_node",
    "langgraph_step": "langgraph_step",
    "ls_provider": "provider",
    "lc_agent_name": "agent_name",
}
#: What LangGraph raises to pause a graph or to go elsewhere in it; in newer versions the first is the others' base.
_CONTROL_FLOW = frozenset({"GraphBubbleUp", "GraphInterrupt", "GraphDelegate"})
#: So many runs are known at once.
_MAX_RUNS = 10_000
#: So many models' stages of one request are held.
_MAX_HELD = 4
#: So many system prompts are known to have been recorded.
_MAX_PROMPTS = 1_000


@attrs.frozen
class Held:
    """The stage of a model that has ended, and is not recorded yet."""

    stage: StageContext
    #: What it wrote that a retriever may search for.
    queries: frozenset[str]
    ended_perf_ns: int


class Run:
    """What is known of a run until it ends; of its content no more than the question of a request."""

    __slots__ = (
        "around",
        "attempt",
        "below",
        "chunks",
        "compressor",
        "first_token_perf_ns",
        "found",
        "held",
        "integration",
        "is_left_out",
        "key",
        "kind",
        "parent",
        "query",
        "reranked",
        "root",
        "said",
        "serves",
    )

    def __init__(self, key: UUID, kind: Kind, parent: Run | None) -> None:
        self.key = key
        self.kind = kind
        self.parent = parent
        #: Those that began in it, and have not ended.
        self.below: dict[UUID, None] = {}
        #: The run that the request began with.
        self.root: Run = self if parent is None else parent.root
        #: The innermost retriever or tool that it is, or runs in.
        self.around: Run | None = None if parent is None else parent.around
        #: Whether something else than the answer is made in it.
        self.serves: bool = parent is not None and parent.serves
        self.is_left_out = False
        self.attempt: int = parent.attempt if parent is not None and parent.is_left_out else 1
        #: What its metadata say of its type, and of who runs it: runs inherit both.
        self.said: Any = None
        self.integration: Any = None
        # Of a root: the question, and the models that may have written a query.
        self.query: str | None = None
        self.held: list[Held] = []
        # Of a model: how it streamed.
        self.chunks = 0
        self.first_token_perf_ns = 0
        # Of a retriever or a tool: how many documents a retriever in it found, and when; what they are compressed by.
        self.compressor: str | None = None
        self.reranked = False
        self.found: tuple[int, int] | None = None


class Runs:
    """The runs of LangChain that one tracer records."""

    def __init__(self, tracer: Stages) -> None:
        self.tracer = tracer
        self.recorder: Recorder = tracer._recorder
        self.observed = ObservedStages(tracer, current_run_id, max_open=_MAX_RUNS)
        self._runs: dict[UUID, Run] = {}
        self._prompts: dict[tuple[object, int], None] = {}
        self.observed.attach()
        self.recorder.add_source(self)
        # Only the handlers keep this alive, of which a program may make one for each request.
        weakref.finalize(self, _give_up, self.observed, self._runs).atexit = False

    def close(self, why: str) -> None:
        """Record what is open as cancelled by `why`, and the models' stages that are held."""
        for run in list(self._runs.values()):
            _release(run)
        self.observed.close(why)

    def get(self, key: UUID | None) -> Run | None:
        """Return the run, if it has begun and not ended."""
        return None if key is None else self._runs.get(key)

    def begin(
        self,
        kind: Kind,
        key: UUID,
        parent_key: UUID | None,
        name: str,
        tags: Sequence[str] | None,
        metadata: Mapping[str, Any] | None,
        attributes: dict[str, Any] | None = None,
    ) -> tuple[Run, StageContext] | None:
        """Begin the stage of a run; None if it gets none, or has one already from another handler of the tracer."""
        if not self.recorder.enabled or key in self._runs:
            return None
        parent = self.get(parent_key)
        run = Run(key, kind, parent)
        stage_type = self._type_of(run, parent, metadata)
        if tags:
            for tag in tags:
                if tag.startswith(_ATTEMPT) and tag[len(_ATTEMPT) :].isdecimal():
                    run.attempt = int(tag[len(_ATTEMPT) :])
        self._runs[key] = run
        if parent is not None:
            parent.below[key] = None
        if len(self._runs) > _MAX_RUNS:
            self._forget_oldest()
        if stage_type is None:
            is_root = parent is None and not self.observed.knows(parent_key)
            if kind == "chain" and not is_root and (_PLUMBING.fullmatch(name) or (tags and _HIDDEN in tags)):
                run.is_left_out = True
                self.observed.leave_out(key, parent_key)
                return None
            stage_type = _TYPES[kind]
            if kind == "chain" and _is_agent(run, parent, name):
                stage_type = "agent"
        stage = self.observed.begin(
            key, parent_key, stage_type, stage_name=name, attributes=attributes, metadata=_metadata(metadata, tags)
        )
        if stage is None:
            return None
        stage.attempt = run.attempt
        if kind == "model" and stage_type == "output":
            stage.stage_type = self._type_of_model(run, stage)
        if stage.stage_type in _PURPOSES:
            run.serves = True
        if kind == "retriever" and run.root.held and attributes:
            self.searched(run, attributes["query"])
        if kind in ("retriever", "tool"):
            run.around = run
        return run, stage

    def end(self, key: UUID, error: BaseException | None = None) -> None:
        """Record the stage of a run."""
        run = self._forget(key)
        if run is not None:
            _release(run)
            # Of what was called off LangChain tells the chains only, not the tool or the retriever in them.
            if run.below and error is not None and cancellation(error) is not None:
                for below in list(run.below):
                    self.end(below, error)
        if error is not None and _is_control_flow(error):
            stage = self.observed.get(key)
            if stage is not None:
                stage.set(interrupted_by=type(error).__name__)
            error = None
        self.observed.end(key, error)

    # -- the question, the prompt ---------------------------------------------------------------------

    def ask(self, run: Run, stage: StageContext, query: str | None) -> None:
        """Record the question of the request that began with this run."""
        if query is None or run.query is not None or run.root is not run or stage.stage_type not in ("chain", "agent"):
            return
        run.query = query
        began = iso_time(stage._made_of[0])
        self.tracer.record_stage(
            "input",
            attributes={"query": query},
            metadata=stage.metadata,
            started_at=began,
            parent=stage,
        )

    def prompted(self, run: Run, stage: StageContext, system: str) -> bool:
        """Say whether this system prompt is new to the request, and remember it."""
        known = self._prompts
        place = (run.root.key if run.root.kind == "chain" else stage.trace_id, hash(system))
        if place in known:
            return False
        known[place] = None
        while len(known) > _MAX_PROMPTS:
            known.pop(next(iter(known)), None)
        return True

    # -- queries that models write --------------------------------------------------------------------

    def hold(self, run: Run, queries: frozenset[str]) -> None:
        """End the stage of a model now, but record it only when it is known whether a retriever searches for this."""
        ended_perf_ns = clock.perf_counter_ns()
        self._forget(run.key)
        stage = self.observed.take(run.key)
        if stage is None:
            return
        root = run.root
        root.held.append(Held(stage, queries, ended_perf_ns))
        if root.key not in self._runs:  # a request that ended before its model did
            _release(root)
        elif len(root.held) > _MAX_HELD:
            _record(root, root.held.pop(0))

    def found(self, key: UUID | None, count: int) -> None:
        """Tell the retriever or the tool around a retriever, which is below `key`, how many documents were found."""
        run = self.get(key)
        if run is not None and run.around is not None:
            run.around.found = (count, clock.time_ns())

    def searched(self, run: Run, query: str) -> None:
        """Make what a model wrote for this search a `query_rewrite`."""
        for held in run.root.held:
            if query.strip() in held.queries:
                held.stage.stage_type = "query_rewrite"
                held.stage.attributes.pop("answer", None)
                held.stage.set(rewritten=query)

    # -- types ----------------------------------------------------------------------------------------

    def _type_of(self, run: Run, parent: Run | None, metadata: Mapping[str, Any] | None) -> str | None:
        """Return what the user says; what a run has inherited is said of the one above."""
        if not metadata:
            return None
        run.integration = metadata.get("ls_integration")
        run.said = said = metadata.get(STAGE_TYPE)
        if not isinstance(said, str) or not said.strip() or (parent is not None and parent.said == said):
            return None
        stage_type = said.strip().lower()
        run.serves = run.serves or stage_type not in _AROUND_ANSWERS
        return stage_type

    def _type_of_model(self, run: Run, stage: StageContext) -> str:
        if run.around is not None and run.around.kind == "retriever":
            return "query_rewrite" if run.around.found is None else "llm"
        if run.serves:
            return "llm"
        scope: Scope | None = stage._outer
        while isinstance(scope, StageContext) and not scope._is_observed:  # stages of the program's own
            if scope.stage_type in _PURPOSES:
                return "llm"
            scope = scope._outer
        return "output"

    def _forget(self, key: UUID) -> Run | None:
        run = self._runs.pop(key, None)
        if run is not None and run.parent is not None:
            run.parent.below.pop(key, None)
        return run

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._runs), None)
        run = None if oldest is None else self._forget(oldest)
        if run is not None:
            _release(run)


def runs_of(tracer: Stages) -> Runs:
    """Return the runs that `tracer` records: the same to all handlers, so that none is recorded twice."""
    runs = _of_tracers.get(tracer._recorder)
    if runs is None:
        runs = _of_tracers.setdefault(tracer._recorder, Runs(tracer))
    return runs


_of_tracers: weakref.WeakValueDictionary[Recorder, Runs] = weakref.WeakValueDictionary()


def _give_up(observed: ObservedStages, runs: dict[UUID, Run]) -> None:
    observed.detach()
    for run in runs.values():
        _release(run)
    observed.close()


def _release(root: Run) -> None:
    """Record the stages of models that are held for a request."""
    while root.held:
        _record(root, root.held.pop(0))


def _record(root: Run, held: Held) -> None:
    if held.stage.stage_type == "query_rewrite" and root.query is not None:
        held.stage.set(original=root.query)
    held.stage._end(None, held.ended_perf_ns)


def _is_agent(run: Run, parent: Run | None, name: str) -> bool:
    if name == "AgentExecutor":
        return True
    is_new = parent is None or parent.integration != run.integration
    return is_new and isinstance(run.integration, str) and run.integration.endswith("_agent")


def _is_control_flow(error: BaseException) -> bool:
    """Whether LangGraph raised this to pause a graph or to go elsewhere in it."""
    kinds = type(error).__mro__
    return any(kind.__module__ == "langgraph.errors" and kind.__name__ in _CONTROL_FLOW for kind in kinds)


def _metadata(given: Mapping[str, Any] | None, tags: Sequence[str] | None) -> dict[str, Any]:
    """Return what the program says of a run, and where in a graph it is."""
    metadata: dict[str, Any] = {}
    if given:
        for name, value in given.items():
            if not name.startswith(_OWN_METADATA):
                metadata[name] = value
            elif name in _KEPT_METADATA:
                metadata[_KEPT_METADATA[name]] = value
    if tags:
        own = [tag for tag in tags if not tag.startswith(_OWN_TAGS)]
        if own:
            metadata["tags"] = own
    return metadata
