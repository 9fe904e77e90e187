"""
The callback handler: turns what LangChain tells of its runs into stages.

In:   LangChain's callbacks, sync and async, in the program's threads and tasks, in the order of the runs.
Out:  runs that begin and end, with the attributes that metrics are computed from.
Never raises, never waits; what it is given is only read.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar
from uuid import UUID

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.draft import iso_time
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.default import default
from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.integrations.langchain import content
from evalvault_sdk.integrations.langchain.content import look
from evalvault_sdk.integrations.langchain.runs import Kind, Run, runs_of

try:
    from langchain_core.callbacks import BaseCallbackHandler
except ImportError as error:
    raise MissingDependencyError.for_extra("the integration of LangChain", "langchain", error) from error

F = TypeVar("F", bound=Callable[..., Any])

#: So many frames up is the retriever whose run begins: more with tracing of other makers around.
_MAX_FRAMES = 12
_KINDS: Mapping[str, Kind] = {"prompt": "prompt", "parser": "parser"}


def _harmless(callback: F) -> F:
    """Keep what goes wrong here from LangChain, which would log it with its content."""

    @functools.wraps(callback)
    def called(self: EvalVaultCallbackHandler, *args: Any, **kwargs: Any) -> None:
        try:
            callback(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
            self.runs.recorder.misread("LangChain", error)

    return called  # type: ignore[return-value]


def _ends(callback: F) -> F:
    """Do the same for a callback that tells of an end: what cannot be read of it must not keep the stage open."""
    harmless = _harmless(callback)

    @functools.wraps(callback)
    def called(self: EvalVaultCallbackHandler, result: Any, *args: Any, run_id: UUID, **told: Any) -> None:
        try:
            harmless(self, result, *args, run_id=run_id, **told)
        finally:  # to no effect if it has ended
            self.runs.end(run_id, result if isinstance(result, BaseException) else None)

    return called  # type: ignore[return-value]


class EvalVaultCallbackHandler(BaseCallbackHandler):
    """
    Records the runs of LangChain and LangGraph as stages: `chain.invoke(x, config={"callbacks": [handler]})`.

    One object is for all requests, threads and tasks, sync and async; making one for each request is as good.
    `tracer` is who records; without, it is the package's own (`evalvault_sdk.configure`). A stage that is open where
    a chain is called becomes its parent, and stages of the program's own code find the run around them.

    A run whose metadata have `evalvault_stage_type` becomes a stage of that type, whatever it is:
    `model.with_config(metadata={"evalvault_stage_type": "query_rewrite"})`. Other metadata are the stage's too.
    """

    #: Called in the task that runs, and in order: in another thread, context and times would be wrong.
    run_inline = True
    raise_error = False
    ignore_custom_event = True

    def __init__(self, tracer: Stages | None = None) -> None:
        self.runs = runs_of(default if tracer is None else tracer)

    def __copy__(self) -> EvalVaultCallbackHandler:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EvalVaultCallbackHandler:
        return self

    # -- chains, prompts, parsers ----------------------------------------------------------------------

    @_harmless
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """Begin a stage, and record the question of a request."""
        kind = _KINDS.get(told.get("run_type") or "", "chain")
        begun = self.runs.begin(kind, run_id, parent_run_id, _name(serialized, told), tags, metadata)
        if begun is None:
            return
        run, stage = begun
        if run.root is run:
            self.runs.ask(run, stage, content.query_of(inputs))
        if stage.stage_type in ("retrieval", "rerank", "query_rewrite") and (query := content.query_of(inputs)):
            stage.set(**{"original" if stage.stage_type == "query_rewrite" else "query": query})

    @_ends
    def on_chain_end(self, outputs: Any, *, run_id: UUID, inputs: Any = None, **told: Any) -> None:
        """End a stage. What was given to a stream is told only now."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is not None and stage is not None:
            self._ask_late(run, stage, inputs)
            if run.kind == "prompt":
                messages = content.messages_of(outputs)
                stage.set(messages=messages)
                if system := content.system_of(messages):
                    self.runs.prompted(run, stage, system)
            elif stage.stage_type in ("retrieval", "rerank"):
                stage.set(**content.documents_of(outputs))
            elif stage.stage_type in ("output", "query_rewrite") and (text := content.text_of(outputs)):
                stage.set(**{"answer" if stage.stage_type == "output" else "rewritten": text})

    @_ends
    def on_chain_error(self, error: BaseException, *, run_id: UUID, inputs: Any = None, **told: Any) -> None:
        """End a stage that failed, was cancelled, or was left by LangGraph's own exceptions."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is not None and stage is not None:
            self._ask_late(run, stage, inputs)

    def _ask_late(self, run: Run, stage: StageContext, inputs: Any) -> None:
        if inputs is not None and run.root is run and run.query is None:
            self.runs.ask(run, stage, content.query_of(inputs))

    # -- models ----------------------------------------------------------------------------------------

    @_harmless
    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[Any]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """Begin the stage of a chat model; a system prompt that came from no template is recorded before it."""
        given = messages[0] if messages else []
        began = iso_time(clock.time_ns())
        begun = self._begin_model(serialized, run_id, parent_run_id, tags, metadata, told)
        if begun is None:
            return
        run, stage = begun
        stage.attributes["message_count"] = len(given)
        if given and look(given[0], "type") == "system":
            first = content.messages_of(given[:1])
            system = content.system_of(first)
            if system is not None and self.runs.prompted(run, stage, system):
                self.runs.tracer.record_stage(
                    "system_prompt",
                    attributes={"messages": first},
                    metadata=stage.metadata,
                    started_at=began,
                    parent=stage._outer,
                )

    @_harmless
    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """Begin the stage of a model that completes texts."""
        self._begin_model(serialized, run_id, parent_run_id, tags, metadata, told)

    def _begin_model(
        self,
        serialized: dict[str, Any] | None,
        run_id: UUID,
        parent_run_id: UUID | None,
        tags: list[str] | None,
        metadata: dict[str, Any] | None,
        told: Mapping[str, Any],
    ) -> tuple[Run, StageContext] | None:
        asked = told.get("invocation_params") or {}
        known = metadata or {}
        attributes = {
            "model": known.get("ls_model_name") or asked.get("model") or asked.get("model_name"),
            "temperature": known.get("ls_temperature", asked.get("temperature")),
            "max_tokens": known.get("ls_max_tokens", asked.get("max_tokens")),
        }
        attributes = {name: value for name, value in attributes.items() if value is not None}
        begun = self.runs.begin(
            "model", run_id, parent_run_id, _name(serialized, told), tags, metadata, attributes=attributes
        )
        if begun is not None and not _streams():
            self.runs.observed.enter(begun[1])
        return begun

    def on_llm_new_token(self, token: Any, *, run_id: UUID, **told: Any) -> None:
        """Note the first token's time, and count. Called for each token: it may cost next to nothing."""
        run = self.runs.get(run_id)
        if run is not None:
            run.chunks += 1
            if token and not run.first_token_perf_ns:
                run.first_token_perf_ns = clock.perf_counter_ns()

    def on_stream_event(self, event: Any, *, run_id: UUID, **told: Any) -> None:
        """Do the same for the events of `stream_events(version="v3")`."""
        if look(event, "event") == "content-block-delta":
            self.on_llm_new_token(event, run_id=run_id)

    @_ends
    def on_llm_end(self, response: Any, *, run_id: UUID, **told: Any) -> None:
        """End the stage of a model."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is None or stage is None:
            return
        result = content.result_of(response)
        if "model" in stage.attributes:
            result.pop("model", None)
        self._streamed(run, stage)
        text = result.get("answer")
        if stage.stage_type == "query_rewrite":
            result.pop("answer", None)
            result.update({"original": run.root.query, "rewritten": text} if run.root.query else {"rewritten": text})
        stage.set(**result)
        if stage.stage_type == "output" and run.root.kind == "chain":
            queries = content.queries_in(text, content.tool_calls_of(response))
            if queries:
                self.runs.hold(run, queries)
                return

    @_ends
    def on_llm_error(self, error: BaseException, *, run_id: UUID, response: Any = None, **told: Any) -> None:
        """End the stage of a model that failed, with what it said before."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is not None and stage is not None:
            self._streamed(run, stage)
            if response is not None:
                stage.set(**{**content.result_of(response), **stage.attributes})

    def _streamed(self, run: Run, stage: StageContext) -> None:
        if run.chunks:
            stage.set(chunk_count=run.chunks)
        if run.first_token_perf_ns:
            stage.set(time_to_first_token_ms=(run.first_token_perf_ns - stage._started_perf_ns) / 1_000_000)

    # -- retrievers ------------------------------------------------------------------------------------

    @_harmless
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """Begin a retrieval, with `top_k` if the retriever has one."""
        attributes: dict[str, Any] = {"query": query}
        retriever = _retriever()
        top_k = _top_k(retriever)
        if top_k is not None:
            attributes["top_k"] = top_k
        begun = self.runs.begin(
            "retriever", run_id, parent_run_id, _name(serialized, told), tags, metadata, attributes=attributes
        )
        if begun is None:
            return
        run, stage = begun
        self.runs.observed.enter(stage)
        compressor = look(retriever, "base_compressor")
        if compressor is not None:
            run.compressor = type(compressor).__name__

    @_ends
    def on_retriever_end(self, documents: Sequence[Any], *, run_id: UUID, **told: Any) -> None:
        """End a retrieval; one that compressed what another one found has reranked it."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is not None and stage is not None:
            attributes = content.documents_of(documents)
            stage.set(**attributes)
            if run.found is not None and run.compressor is not None and not run.reranked:
                input_count, began_ns = run.found
                now_ns = clock.time_ns()
                self.runs.tracer.record_stage(
                    "rerank",
                    stage_name=run.compressor,
                    attributes={
                        "query": stage.attributes.get("query"),
                        "input_count": input_count,
                        "output_count": len(documents),
                        **attributes,
                    },
                    metadata=stage.metadata,
                    started_at=iso_time(began_ns),
                    finished_at=iso_time(now_ns),
                    duration_ms=max(now_ns - began_ns, 0) / 1_000_000,
                    parent=stage,
                )
            self.runs.found(told.get("parent_run_id"), len(documents))

    @_ends
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **told: Any) -> None:
        """End a retrieval that failed."""

    # -- tools -----------------------------------------------------------------------------------------

    @_harmless
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **told: Any,
    ) -> None:
        """Begin the stage of a tool, with its arguments."""
        name = _name(serialized, told)
        attributes = {"tool_name": name, "input": input_str if inputs is None else inputs}
        self.runs.begin("tool", run_id, parent_run_id, name, tags, metadata, attributes=attributes)

    @_ends
    def on_tool_end(self, output: Any, *, run_id: UUID, **told: Any) -> None:
        """End the stage of a tool; one that gives documents back beside its text, and ran no retriever, retrieved."""
        run, stage = self.runs.get(run_id), self.runs.observed.get(run_id)
        if run is not None and stage is not None:
            artifact = look(output, "artifact")
            if stage.stage_type == "tool" and run.found is None and _are_documents(artifact):
                query = content.query_of(stage.attributes.get("input"))
                stage.stage_type = "retrieval"
                stage.set(query=query, **content.documents_of(artifact))
                if query is not None:
                    self.runs.searched(run, query)
            elif stage.stage_type in ("retrieval", "rerank"):
                stage.set(**content.documents_of(output if artifact is None else artifact))
            if look(output, "status") == "error":
                stage.fail(content.text_of(output) or "the tool says so", kind="ToolException")

    @_ends
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **told: Any) -> None:
        """End the stage of a tool that failed."""

    @_harmless
    def on_retry(self, retry_state: Any, *, run_id: UUID, **told: Any) -> None:
        """Count the attempts of what retries by itself."""
        stage = self.runs.observed.get(run_id)
        if stage is not None:
            stage.attempt = int(retry_state.attempt_number) + 1


def _name(serialized: Mapping[str, Any] | None, told: Mapping[str, Any]) -> str:
    """Return the name of what runs."""
    name = told.get("name")
    if not name and serialized:
        name = serialized.get("name") or (serialized.get("id") or [None])[-1]
    return str(name) if name else "unnamed"


def _caller(*names: str) -> FrameType | None:
    """Return the frame of the method of LangChain, one of these, that begins the run: it tells nothing of it."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_code.co_name in names:
            return frame
        frame = frame.f_back
    return None


def _retriever() -> Any:
    """Return the retriever whose run begins."""
    frame = _caller("invoke", "ainvoke")
    caller = None if frame is None else frame.f_locals.get("self")
    return caller if hasattr(caller, "_get_relevant_documents") else None


def _streams() -> bool:
    """Whether the model whose run begins is read as a stream: between its items the program's own code runs."""
    frame = _caller("generate", "agenerate", "stream", "astream")
    return frame is None or frame.f_code.co_name in ("stream", "astream")


def _top_k(retriever: Any) -> int | None:
    settings = look(retriever, "search_kwargs")
    for place, name in ((settings, "k"), (retriever, "k"), (retriever, "top_k"), (retriever, "top_n")):
        value = look(place, name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _are_documents(artifact: Any) -> bool:
    return isinstance(artifact, list) and bool(artifact) and look(artifact[0], "page_content") is not None
