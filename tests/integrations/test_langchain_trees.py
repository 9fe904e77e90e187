"""Programs of LangChain and LangGraph, stage by stage: the same tree in all ways of running them."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackManager
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import tool

from evalvault_sdk import StageTracer
from evalvault_sdk.integrations.langchain import EvalVaultCallbackHandler
from evalvault_sdk.server.metrics import metrics_of
from evalvault_sdk.testing import CapturingTransport, RecordedStage, RecordedStages, record_stages
from tests.integrations.langchain_programs import PROMPT, Passages, Scripted, agent, graph, joined, rag_chain

LCEL = """
chain RunnableSequence
  input
  retrieval Passages
  chain joined
  system_prompt ChatPromptTemplate
  output Scripted
  parser StrOutputParser
""".strip()


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages
        assert stages.refused == {}


@pytest.fixture
def handler(tracer: StageTracer) -> Iterator[EvalVaultCallbackHandler]:
    made = EvalVaultCallbackHandler(tracer)
    yield made
    assert len(made.runs.observed) == 0, "nothing is left open"
    assert made.runs._runs == {}


def lines(stage: RecordedStage, depth: int = 0) -> list[str]:
    event = stage.event
    line = "  " * depth + event.stage_type + (f" {event.stage_name}" if event.stage_name else "")
    line += "" if event.status == "success" else f" ({event.status})"
    return [line, *(inner for child in stage.children for inner in lines(child, depth + 1))]


def tree(recorded: RecordedStages) -> str:
    return "\n".join(line for root in recorded.roots for line in lines(root))


def is_useful(recorded: RecordedStages) -> set[str]:
    """Assert that no required stage is missing, and return the metrics that the server has to show."""
    events = recorded.events
    assert {"system_prompt", "input", "retrieval", "output"} <= {event.stage_type for event in events}
    return {metric.metric_name for event in events for metric in metrics_of(event)}


METRICS = {"input.query_length", "retrieval.result_count", "retrieval.avg_score", "output.token_ratio"}


def test_a_chain_is_a_tree_of_typed_stages(handler: EvalVaultCallbackHandler, recorded: RecordedStages) -> None:
    config: Any = {"callbacks": [handler]}
    assert rag_chain().invoke("rain", config) == rag_chain().invoke("rain")
    assert tree(recorded) == LCEL
    assert is_useful(recorded) >= METRICS
    (root,) = recorded.roots
    assert root.find("input").attributes == {"query": "rain"}
    assert root.find("retrieval").attributes == {
        "query": "rain",
        "top_k": 2,
        "doc_ids": ["rain-1", "rain-2"],
        "scores": [1.0, 0.5],
    }
    assert root.find("system_prompt").attributes["messages"] == [
        {"role": "system", "content": "Cite.\nabout rain\nabout rain"},
        {"role": "human", "content": "rain"},
    ]
    assert root.find("output").attributes == {
        "model": "scripted-1",
        "temperature": 0.5,
        "message_count": 2,
        "answer": "echo rain",
        "finish_reason": "stop",
        "tokens_in": 10,
        "tokens_out": 4,
        "tokens_total": 14,
    }


def test_a_chain_that_is_awaited_is_the_same_tree(handler: EvalVaultCallbackHandler, recorded: RecordedStages) -> None:
    assert asyncio.run(rag_chain().ainvoke("rain", {"callbacks": [handler]})) == "echo rain"
    assert tree(recorded) == LCEL
    assert recorded.find("retrieval").attributes["top_k"] == 2
    assert is_useful(recorded) >= METRICS


def streamed(recorded: RecordedStages) -> None:
    assert sorted(line.strip() for line in tree(recorded).splitlines()) == sorted(
        line.strip() for line in LCEL.splitlines()
    )
    assert is_useful(recorded) >= METRICS
    (root,) = recorded.roots
    assert len(root.children) == 6
    assert root.find("input").attributes == {"query": "rain"}
    output = root.find("output").attributes
    assert output["answer"] == "echorain"
    assert output["chunk_count"] >= 2
    assert 0 <= output["time_to_first_token_ms"] <= (root.find("output").event.duration_ms or 0)


def test_a_stream_is_the_same_tree_with_its_question_and_the_first_tokens_time(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    assert list(rag_chain().stream("rain", {"callbacks": [handler]})) == list(rag_chain().stream("rain"))
    streamed(recorded)


def test_astream_events_is_the_same_tree(handler: EvalVaultCallbackHandler, recorded: RecordedStages) -> None:
    async def kinds(config: Any) -> list[str]:
        return [event["event"] async for event in rag_chain().astream_events("rain", config, version="v2")]

    assert asyncio.run(kinds({"callbacks": [handler]})) == asyncio.run(kinds({}))
    streamed(recorded)


def test_a_stream_that_is_left_early_leaves_nothing_open(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    stream = Scripted(says=["one two three"]).stream("rain", {"callbacks": [handler]})
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert tree(recorded) == "output Scripted (cancelled)"
    assert recorded.find("output").attributes["cancelled_by"] == "GeneratorExit"


@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
def test_fifty_inputs_at_once_are_fifty_trees(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages, is_async: bool
) -> None:
    questions = [f"question {number}" for number in range(50)]
    config: Any = {"callbacks": [handler]}
    chain = rag_chain()
    answers = asyncio.run(chain.abatch(questions, config)) if is_async else chain.batch(questions, config)
    assert answers == [f"echo {question}" for question in questions]
    assert len(recorded.roots) == 50
    assert len({root.event.trace_id for root in recorded.roots}) == 50
    for root in recorded.roots:
        assert sorted(line.strip() for line in lines(root)) == sorted(line.strip() for line in LCEL.splitlines())
        question = root.find("input").attributes["query"]
        assert root.find("retrieval").attributes["query"] == question
        assert root.find("output").attributes["answer"] == f"echo {question}"


def test_an_agents_tools_models_and_retrievals_are_stages(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    asked = {"messages": [("user", "Do I need an umbrella?")]}
    result = agent().invoke(asked, {"callbacks": [handler]})
    assert [message.content for message in result["messages"]] == [
        message.content for message in agent().invoke(asked)["messages"]
    ]
    # The glue around models differs between versions, and is not what is promised.
    kept = [line for line in tree(recorded).splitlines() if not line.strip().startswith("chain")]
    assert [line.strip() for line in kept if not line.startswith("agent")] == [
        "input",
        "system_prompt",
        "output Scripted",
        "tool weather",
        "query_rewrite Scripted",
        "tool search",
        "retrieval Passages",
        "output Scripted",
    ]
    assert is_useful(recorded) >= METRICS
    (root,) = recorded.roots
    assert (root.event.stage_type, root.event.stage_name) in (("agent", "LangGraph"), ("chain", "LangGraph"))
    assert root.find("input").attributes == {"query": "Do I need an umbrella?"}
    rewrite = root.find("query_rewrite").attributes
    assert (rewrite["original"], rewrite["rewritten"]) == ("Do I need an umbrella?", "umbrella")
    assert rewrite["tool_calls"] == ["search"]
    tools = [stage for stage in root._all() if stage.stage_type == "tool"]
    assert [stage.attributes["input"] for stage in tools] == [{"city": "Seoul"}, {"query": "umbrella"}]
    assert [child.stage_type for child in tools[1].children] == ["retrieval"]


GRAPH = """
chain LangGraph
  input
  chain rewrite
    query_rewrite Scripted
  chain retrieve
    retrieval Passages
    chain is_enough
  chain rewrite
    query_rewrite Scripted
  chain retrieve
    retrieval Passages
    chain is_enough
  chain answer
    system_prompt ChatPromptTemplate
    output Scripted
    parser StrOutputParser
""".strip()


@pytest.mark.parametrize("is_async", [False, True], ids=["invoke", "ainvoke"])
def test_a_graph_with_a_branch_and_a_loop_is_a_tree_of_its_nodes(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages, is_async: bool
) -> None:
    config: Any = {"callbacks": [handler], "configurable": {"thread_id": "t-1"}}
    asked = {"question": "rain?", "tries": 0}
    answered = asyncio.run(graph().ainvoke(asked, config)) if is_async else graph().invoke(asked, config)
    assert answered["text"] == graph().invoke(asked)["text"] == "It is so."
    assert tree(recorded) == GRAPH
    assert is_useful(recorded) >= METRICS
    (root,) = recorded.roots
    nodes = [child for child in root.children if child.stage_type == "chain"]
    assert [node.metadata["langgraph_node"] for node in nodes] == ["rewrite", "retrieve"] * 2 + ["answer"]
    assert [node.metadata["langgraph_step"] for node in nodes] == [1, 2, 3, 4, 5]
    assert {node.metadata["thread_id"] for node in nodes} == {"t-1"}
    rewrites = [stage.attributes for stage in root._all() if stage.stage_type == "query_rewrite"]
    assert [(each["original"], each["rewritten"]) for each in rewrites] == [
        ("rain?", "first try"),
        ("rain?", "second try"),
    ]
    assert all("answer" not in each for each in rewrites)


def test_a_stage_of_the_program_and_the_runs_around_and_in_it_are_one_tree(
    tracer: StageTracer, handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    from langchain_core.runnables import RunnableLambda

    inner = Scripted(says=["yes"])

    def check(question: str) -> str:
        with tracer.stage("safety_check"):
            inner.invoke("is it safe?")
        return question

    with tracer.stage("request"):
        (RunnableLambda(check) | (lambda text: tracer.record_stage("note") and text)).invoke(
            "rain", {"callbacks": [handler]}
        )
    # What a lambda without a name does is below what is around it.
    assert re.sub(r" +$", "", tree(recorded)) == (
        "request\n  chain RunnableSequence\n    input\n    chain check\n      safety_check\n"
        "        llm Scripted\n    note"
    )


def test_content_none_sends_no_text(recorded: RecordedStages) -> None:
    with (
        StageTracer("r", "http://127.0.0.1:1", durability="memory", content="none", shutdown_timeout_s=0.1) as tracer,
        record_stages(tracer) as stages,
    ):
        model = Scripted(says=[AIMessage("very secret answer", tool_calls=[])])
        rag_chain(model).invoke("secret question", {"callbacks": [EvalVaultCallbackHandler(tracer)]})
        texts = str([event.to_dict() for event in stages.events])
        assert len(stages) == 7
        assert "secret" not in texts


@pytest.fixture
def traced_inside(tracer: StageTracer) -> Any:
    """A retriever and a model that record stages of their own."""

    class Retriever(Passages):
        def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Document]:
            with tracer.stage("vector_search"):
                return super()._get_relevant_documents(query, run_manager=run_manager)

    class Model(Scripted):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
            with tracer.stage("http_call"):
                return super()._generate(messages, stop, run_manager, **kwargs)

    return Retriever(), Model()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_stages_of_the_program_are_below_the_retriever_and_the_model_that_they_run_in(
    tracer: StageTracer, recorded: RecordedStages, handler: EvalVaultCallbackHandler, traced_inside: Any, way: str
) -> None:
    retriever, model = traced_inside
    config: Any = {"callbacks": [handler]}

    def ask(runnable: Any, given: Any) -> Any:
        return runnable.invoke(given, config) if way == "sync" else asyncio.run(runnable.ainvoke(given, config))

    # The oldest versions tell of an async model's beginning in a task of its own, which nothing can be found from.
    manager = inspect.getsource(AsyncCallbackManager.on_chat_model_start)
    is_told_apart = way == "async" and "inline" not in manager
    ask(retriever, "q")
    ask(model, "q")
    assert recorded.outline() == f"retrieval\n  vector_search\noutput\n{'' if is_told_apart else '  '}http_call"
    recorded.clear()
    ask({"context": retriever | joined, "question": RunnablePassthrough()} | PROMPT | model, "q")
    tracer.record_stage("after")
    outline = [
        line for line in recorded.outline().splitlines() if "search" in line or "call" in line or "after" in line
    ]
    assert outline == ["    vector_search", f"{'  ' if is_told_apart else '    '}http_call", "after"]


def test_what_a_program_does_between_the_items_of_a_model_is_not_in_the_model(
    tracer: StageTracer, recorded: RecordedStages, handler: EvalVaultCallbackHandler
) -> None:
    with tracer.stage("request"):
        for _ in Scripted().stream("one two", {"callbacks": [handler]}):
            tracer.record_stage("shown")
    assert set(re.findall(r"^ *shown", recorded.outline(), flags=re.MULTILINE)) == {"  shown"}


def test_a_tool_whose_task_is_cancelled_is_cancelled_too(
    recorded: RecordedStages, handler: EvalVaultCallbackHandler
) -> None:
    @tool
    async def slow(city: str) -> str:
        """Take too long."""
        await asyncio.sleep(60)
        return city

    async def ask() -> None:
        chain: Any = RunnableLambda(lambda city: {"city": city}) | slow
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(chain.ainvoke("Seoul", {"callbacks": [handler]}), 0.05)

    asyncio.run(ask())
    assert (recorded.find("tool").status, recorded.find("chain").status) == ("cancelled", "cancelled")


def test_what_a_retriever_gives_that_cannot_be_read_ends_it_all_the_same(
    recorded: RecordedStages, handler: EvalVaultCallbackHandler
) -> None:
    class Lazy(Passages):
        def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> Any:
            return iter(super()._get_relevant_documents(query, run_manager=run_manager))

    found: Any = Lazy().invoke("q", {"callbacks": [handler]})
    assert [document.metadata["id"] for document in found] == ["q-1", "q-2"]
    assert recorded.find("retrieval").status == "success"


def test_what_is_open_and_what_is_held_when_the_tracer_ends_is_recorded() -> None:
    transport = CapturingTransport()
    tracer = StageTracer("r", transport=transport)

    def end(answer: Any) -> Any:
        tracer.shutdown()
        return answer

    chain: Any = Scripted() | RunnableLambda(end)
    chain.invoke("q", {"callbacks": [EvalVaultCallbackHandler(tracer)]})
    statuses = {event.stage_type: event.status for event in transport.events}
    assert statuses == {"input": "success", "output": "success", "chain": "cancelled"}
