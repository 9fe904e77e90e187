"""What a single run becomes: its type, its attributes, its end; and what of it is kept."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib.util
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import ToolException, tool

from evalvault_sdk import StageTracer
from evalvault_sdk.capture import context
from evalvault_sdk.integrations.langchain import EvalVaultCallbackHandler, runs
from evalvault_sdk.integrations.langchain.content import query_of, result_of
from evalvault_sdk.testing import FakeClock, RecordedStages, record_stages
from tests.integrations.langchain_programs import PROMPT, KeepFirst, Passages, Scripted, said, search

# What was in `langchain` is in `langchain_classic` since 1.0.
CLASSIC = "langchain_classic" if importlib.util.find_spec("langchain_classic") else "langchain"
chains = importlib.import_module(f"{CLASSIC}.chains")
retrievers = importlib.import_module(f"{CLASSIC}.retrievers")


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages
        assert stages.refused == {}


@pytest.fixture
def handler(tracer: StageTracer) -> EvalVaultCallbackHandler:
    return EvalVaultCallbackHandler(tracer)


@pytest.fixture
def config(handler: EvalVaultCallbackHandler) -> Any:
    return {"callbacks": [handler]}


@pytest.mark.parametrize(
    "inputs",
    [
        "q",
        {"question": "q", "top": 3},
        {"input": {"query": "q"}},
        {"anything": "q"},
        [HumanMessage("first"), AIMessage("a"), HumanMessage("q"), AIMessage("")],
        {"messages": [("user", "q")]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        HumanMessage("q"),
    ],
)
def test_the_question_is_found_in_what_chains_are_given(inputs: Any) -> None:
    assert query_of(inputs) == "q"


@pytest.mark.parametrize("inputs", [None, 3, {}, {"a": "x", "b": "y"}, {"input": ""}, [], [AIMessage("a")]])
def test_what_is_no_question_is_not_taken_for_one(inputs: Any) -> None:
    assert query_of(inputs) is None


def test_tokens_reasons_and_citations_are_read_in_the_forms_of_several_providers() -> None:
    def result(message: AIMessage, **told: Any) -> dict[str, Any]:
        return result_of(LLMResult(generations=[[ChatGeneration(message=message)]], llm_output=told or None))

    openai = AIMessage(
        [
            {
                "type": "text",
                "text": "It is.",
                "annotations": [
                    {"type": "url_citation", "url": "https://a.example", "title": "A"},
                    {"type": "file_citation", "file_id": "file-1"},
                    {"type": "url_citation", "url": "https://a.example"},
                ],
            }
        ],
        response_metadata={"finish_reason": "stop", "model_name": "gpt-x"},
    )
    assert result(openai, token_usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}) == {
        "answer": "It is.",
        "model": "gpt-x",
        "finish_reason": "stop",
        "tokens_in": 7,
        "tokens_out": 2,
        "tokens_total": 9,
        "citations": ["https://a.example", "file-1"],
    }
    anthropic = AIMessage(
        [{"type": "text", "text": "So", "citations": [{"document_title": "policy.pdf", "cited_text": "..."}]}],
        response_metadata={"stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 1}},
    )
    assert result(anthropic) == {
        "answer": "So",
        "finish_reason": "end_turn",
        "tokens_in": 3,
        "tokens_out": 1,
        "citations": ["policy.pdf"],
    }


def test_a_model_that_completes_texts_is_an_output(config: Any, recorded: RecordedStages) -> None:
    assert FakeListLLM(responses=["fine"]).invoke("how?", config) == "fine"
    assert recorded.outline() == "output"
    assert recorded.find("output").attributes["answer"] == "fine"


def test_an_error_is_recorded_on_the_run_that_failed_and_those_around_it_and_passes_through(
    config: Any, recorded: RecordedStages
) -> None:
    error = TimeoutError("no answer")
    with pytest.raises(TimeoutError) as caught:
        (PROMPT | Scripted(says=[error])).invoke({"context": "", "question": "q"}, config)
    assert caught.value is error
    assert recorded.outline() == "chain (error)\n  input\n  system_prompt\n  output (error)"
    assert recorded.find("output").attributes["error"] == {"type": "TimeoutError", "message": "no answer"}


def test_each_attempt_of_with_retry_is_a_stage_with_its_number(config: Any, recorded: RecordedStages) -> None:
    model = Scripted(says=[TimeoutError("once"), "then"]).with_retry(wait_exponential_jitter=False)
    assert model.invoke("q", config).content == "then"
    attempts = [event for event in recorded.events if event.stage_type == "output"]
    assert [(event.attempt, event.status) for event in attempts] == [(1, "error"), (2, "success")]


def test_a_model_that_retries_by_itself_says_which_attempt_it_was(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    class Failed:
        attempt_number = 2

    run_id = uuid.uuid4()
    handler.on_llm_start({"name": "llm"}, ["q"], run_id=run_id)
    handler.on_retry(Failed(), run_id=run_id)
    handler.on_llm_end(LLMResult(generations=[]), run_id=run_id)
    assert recorded.find("output").event.attempt == 3


def test_a_cancelled_task_is_cancelled(config: Any, recorded: RecordedStages) -> None:
    async def slow(question: str) -> str:
        await asyncio.sleep(60)
        return question

    async def program() -> None:
        task = asyncio.create_task(RunnableLambda(slow).ainvoke("q", config))
        await asyncio.sleep(0)
        while not len(config["callbacks"][0].runs.observed):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(program())
    assert recorded.outline() == "chain (cancelled)\n  input"


def test_a_models_words_that_a_retriever_searches_for_are_a_query_rewrite(
    config: Any, recorded: RecordedStages
) -> None:
    rewriting = Scripted(says=['1. "flood damage"\n2. storm damage'])
    chain = rewriting | RunnableLambda(lambda message: str(message.content).splitlines()[0][4:-1]) | Passages()
    assert len(chain.invoke("water?", config)) == 2
    assert recorded.outline() == "chain\n  input\n  query_rewrite\n  retrieval"
    attributes = recorded.find("query_rewrite").attributes
    assert (attributes["original"], attributes["rewritten"]) == ("water?", "flood damage")
    assert attributes["tokens_in"] == 10


def test_a_model_that_is_not_searched_for_stays_an_output_and_keeps_its_own_duration(
    config: Any, recorded: RecordedStages
) -> None:
    with FakeClock() as clock:

        def wait(message: Any) -> str:
            clock.advance(60)
            return "other"

        (Scripted() | RunnableLambda(wait) | Passages()).invoke("water?", config)
    assert recorded.outline() == "chain\n  input\n  output\n  chain\n  retrieval"
    assert (recorded.find("output").event.duration_ms or 0) < 1


def test_more_models_than_are_held_are_recorded_at_once(
    handler: EvalVaultCallbackHandler, recorded: RecordedStages
) -> None:
    model = Scripted()

    def ask_often(question: str) -> str:
        for _ in range(6):
            model.invoke(question)
        assert [event.stage_type for event in recorded.events].count("output") == 2
        return question

    RunnableLambda(ask_often).invoke("q", {"callbacks": [handler]})
    assert [event.stage_type for event in recorded.events].count("output") == 6


def test_models_in_a_retriever_rewrite_the_query(config: Any, recorded: RecordedStages) -> None:
    retriever = retrievers.MultiQueryRetriever.from_llm(Passages(), Scripted(says=["one\ntwo"]))
    retriever.invoke("q", config)
    kept = [line.strip() for line in recorded.outline().splitlines() if line.strip() != "chain"]
    assert sorted(kept) == ["parser", "query_rewrite", "retrieval", "retrieval", "retrieval", "system_prompt"]


def test_a_history_aware_retrievers_model_rewrites_the_query(config: Any, recorded: RecordedStages) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Say it whole."), ("human", "{chat_history} {input}")])
    chain = chains.create_history_aware_retriever(Scripted(says=["standalone"]), Passages(), prompt)
    with_history = {"input": "and then?", "chat_history": [HumanMessage("before")]}
    chain.invoke(with_history, config)
    assert recorded.find("query_rewrite").attributes["rewritten"] == "standalone"
    assert recorded.find("retrieval").attributes["query"] == "standalone"
    assert "output" not in recorded.outline()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_compression_is_a_rerank_of_what_the_inner_retriever_found(
    config: Any, recorded: RecordedStages, is_async: bool
) -> None:
    retriever = retrievers.ContextualCompressionRetriever(base_compressor=KeepFirst(), base_retriever=Passages())
    found = asyncio.run(retriever.ainvoke("q", config)) if is_async else retriever.invoke("q", config)
    assert [document.metadata["id"] for document in found] == ["q-1"]
    assert recorded.outline() == "retrieval\n  retrieval\n  rerank"
    rerank = recorded.find("rerank")
    assert rerank.event.stage_name == "KeepFirst"
    assert rerank.attributes == {
        "query": "q",
        "input_count": 2,
        "output_count": 1,
        "doc_ids": ["q-1"],
        "scores": [0.9],
    }


def test_documents_without_an_id_have_one_of_their_content(config: Any, recorded: RecordedStages) -> None:
    class Nameless(Passages):
        def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Document]:
            return [Document(page_content="same"), Document(page_content="other"), Document(page_content="same")]

    Nameless().invoke("q", config)
    first, second, third = recorded.find("retrieval").attributes["doc_ids"]
    assert first == third != second


def test_a_tool_that_gives_documents_back_is_a_retrieval(config: Any, recorded: RecordedStages) -> None:
    @tool(response_format="content_and_artifact")
    def look_up(query: str) -> Any:
        """Look something up."""
        documents = [Document(page_content="x", metadata={"id": "d-1"})]
        return "x", documents

    look_up.invoke({"name": "look_up", "args": {"query": "q"}, "id": "1", "type": "tool_call"}, config)
    assert recorded.outline() == "retrieval"
    assert recorded.find("retrieval").attributes["doc_ids"] == ["d-1"]
    assert recorded.find("retrieval").attributes["query"] == "q"


def test_a_tool_that_handles_its_error_has_failed_all_the_same(config: Any, recorded: RecordedStages) -> None:
    @tool
    def refuse(query: str) -> str:
        """Refuse."""
        raise ToolException("not for you")

    refuse.handle_tool_error = True
    refuse.invoke({"name": "refuse", "args": {"query": "q"}, "id": "1", "type": "tool_call"}, config)
    assert recorded.find("tool").status == "error"


@pytest.mark.parametrize("name", ["model", "chain", "tool", "retriever", "prompt"])
def test_a_user_says_of_which_type_a_run_is(config: Any, recorded: RecordedStages, name: str) -> None:
    what: dict[str, tuple[Any, Any]] = {
        "model": (Scripted(), "q"),
        "chain": (RunnableLambda(lambda text: text) | RunnableLambda(lambda text: text), "q"),
        "tool": (search, {"query": "q"}),
        "retriever": (Passages(), "q"),
        "prompt": (PROMPT, {"context": "", "question": "q"}),
    }
    runnable, given = what[name]
    labelled = runnable.with_config(metadata={"evalvault_stage_type": "Intent"})
    RunnableLambda(lambda _: labelled.invoke(given)).invoke("q", config)
    assert [event.stage_type for event in recorded.events].count("intent") == 1
    event = recorded.find("intent").event
    assert "evalvault_stage_type" not in event.metadata
    assert recorded.roots[0].children[1].event.stage_id == event.stage_id


def test_what_runs_in_a_stage_that_a_user_named_serves_that(config: Any, recorded: RecordedStages) -> None:
    rewriting = (PROMPT | Scripted(says=["better"])).with_config(metadata={"evalvault_stage_type": "query_rewrite"})
    rewriting.invoke({"context": "", "question": "q"}, config)
    assert recorded.outline() == "query_rewrite\n  system_prompt\n  llm"
    assert recorded.find("query_rewrite").attributes == {"original": "q", "rewritten": "better"}


def test_metadata_and_tags_of_the_program_are_those_of_the_stages(config: Any, recorded: RecordedStages) -> None:
    config = {**config, "metadata": {"session_id": "s-1", "relevant_doc_ids": ["q-2"]}, "tags": ["beta"]}
    (RunnableLambda(lambda text: text) | Passages()).invoke("q", config)
    for event in recorded.events:
        assert event.metadata == {"session_id": "s-1", "relevant_doc_ids": ["q-2"], "tags": ["beta"]}


def test_a_system_prompt_without_a_template_is_recorded_once_for_a_request(
    config: Any, recorded: RecordedStages
) -> None:
    model = Scripted()

    def ask_twice(question: str) -> str:
        for _ in range(2):
            model.invoke([SystemMessage("Be brief."), HumanMessage(question)])
        return question

    RunnableLambda(ask_twice).batch(["a", "b"], config)
    assert recorded.outline() == "\n".join(["chain\n  input\n  system_prompt\n  output\n  output"] * 2)


def test_a_pause_of_langgraph_is_no_error(config: Any, recorded: RecordedStages) -> None:
    from langgraph.errors import GraphInterrupt

    def pause(_: str) -> str:
        raise GraphInterrupt(())

    with pytest.raises(GraphInterrupt):
        RunnableLambda(pause).invoke("q", config)
    (event,) = [event for event in recorded.events if event.stage_type == "chain"]
    assert (event.status, event.attributes) == ("success", {"interrupted_by": "GraphInterrupt"})


def test_plumbing_is_left_out_and_what_runs_in_it_is_not(config: Any, recorded: RecordedStages) -> None:
    both = RunnableParallel(a=Passages(), b=RunnableLambda(lambda text: text) | Passages())
    (both | RunnableLambda(lambda found: found)).invoke("q", config)
    assert recorded.outline() == "chain\n  input\n  retrieval\n  retrieval"


def test_two_handlers_of_one_tracer_record_each_run_once(tracer: StageTracer, recorded: RecordedStages) -> None:
    first, second = EvalVaultCallbackHandler(tracer), EvalVaultCallbackHandler(tracer)
    (RunnableLambda(lambda text: text) | Scripted(callbacks=[second])).invoke("q", {"callbacks": [first, second]})
    assert recorded.outline() == "chain\n  input\n  output"


def test_runs_that_never_end_are_bounded(
    tracer: StageTracer, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_MAX_RUNS", 10)
    handler = EvalVaultCallbackHandler(tracer)
    for _ in range(100):
        root, model = uuid.uuid4(), uuid.uuid4()
        handler.on_chain_start(None, "q", run_id=root, name="begun")
        handler.on_chat_model_start(None, [[]], run_id=model, parent_run_id=root, name="model")
        handler.on_llm_end(LLMResult(generations=[[ChatGeneration(message=said("a"))]]), run_id=model)
    assert len(handler.runs._runs) <= 10
    assert len(handler.runs.observed) <= 10
    outputs = [event.status for event in recorded.events if event.stage_type == "output"]
    assert len(outputs) >= 90
    assert set(outputs) == {"success"}


def test_a_handler_that_is_thrown_away_leaves_nothing(tracer: StageTracer, recorded: RecordedStages) -> None:
    gc.collect()
    before = set(context.finders)
    for _ in range(3):
        handler = EvalVaultCallbackHandler(tracer)
        Passages().invoke("q", {"callbacks": [handler]})
        handler.on_chain_start(None, "q", run_id=uuid.uuid4(), name="begun")
        assert len(set(context.finders) - before) == 1
        del handler
        gc.collect()
        assert set(context.finders) <= before
    assert recorded.outline().splitlines() == ["retrieval", "chain (cancelled)", "  input"] * 3


def test_a_handler_may_be_copied_with_what_holds_it(handler: EvalVaultCallbackHandler) -> None:
    assert copy.copy(handler) is handler
    assert copy.deepcopy({"callbacks": [handler]})["callbacks"][0] is handler


def test_a_fault_of_ours_is_counted_and_reaches_neither_the_program_nor_its_log(
    config: Any, tracer: StageTracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(runs.Runs, "begin", broken)
    with record_stages(tracer) as stages:
        assert (RunnableLambda(lambda text: text) | Scripted()).invoke("q", config).content == "echo q"
    assert stages.notes["hook_errors"] >= 2
    assert "secret" not in caplog.text


def test_a_tracer_that_is_switched_off_keeps_nothing() -> None:
    with StageTracer("r", "http://127.0.0.1:1", enabled=False) as tracer:
        handler = EvalVaultCallbackHandler(tracer)
        (RunnableLambda(lambda text: text) | Scripted()).invoke("q", {"callbacks": [handler]})
        assert (len(handler.runs._runs), len(handler.runs.observed)) == (0, 0)
