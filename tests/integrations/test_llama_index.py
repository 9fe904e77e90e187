"""LlamaIndex's programs as stages: real packages, with models and embeddings that need no network."""
# No postponed annotations: older workflows read those of their steps as they are.

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from evalvault_sdk import StageTracer, current_stage
from evalvault_sdk.capture import context
from evalvault_sdk.testing import FakeClock, RecordedStages, record_stages
from tests.support import run_script

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, LLMMetadata
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.dispatcher import instrument_tags  # type: ignore[attr-defined]
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import SubQuestionQueryEngine, TransformQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolMetadata
from llama_index.core.workflow import Event, StartEvent, StopEvent, Workflow, step

from evalvault_sdk.integrations.llama_index import LlamaIndexInstrumentation, instrument_llama_index, reading

#: LlamaIndex's own use of what its dependencies will not have for ever.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

#: Newer chat engines answer with a synthesizer, older ones call the model themselves.
CHATS_SYNTHESIZE = "_get_response_synthesizer" in vars(CondensePlusContextChatEngine)
NODES = [TextNode(text=f"보험 약관 {number}", id_=f"n{number}") for number in range(3)]
QUESTIONS = (
    '```json\n{"items": [{"sub_question": "A?", "tool_name": "docs"}, '
    '{"sub_question": "B?", "tool_name": "docs"}]}\n```'
)


class BrokenError(Exception):
    """What a model, or a retriever, of these tests fails with."""


class Model(CustomLLM):
    """A model that answers at once, and streams word by word: 2 s to the first one, 1 s to each other."""

    answer: str = "The sum is 1억원"
    fails: bool = False
    clock: Any = None

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="model-1", context_window=8000)

    def _reply(self, prompt: str) -> str:
        return QUESTIONS if "sub" in prompt and "tool_name" in prompt else self.answer

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if self.fails:
            raise BrokenError("no model")
        raw = {"usage": {"prompt_tokens": 50, "completion_tokens": 5}, "choices": [{"finish_reason": "stop"}]}
        return CompletionResponse(text=self._reply(prompt), raw=raw)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
        def words() -> Iterator[CompletionResponse]:
            text = ""
            for number, word in enumerate(self._reply(prompt).split()):
                if self.clock is not None:
                    self.clock.advance(1 if number else 2)
                if self.fails and number:
                    raise BrokenError("no more words")
                text += f" {word}" if number else word
                yield CompletionResponse(text=text, delta=f" {word}" if number else word)

        return words()


@pytest.fixture
def index() -> VectorStoreIndex:
    """Made before anything is recorded."""
    return VectorStoreIndex(NODES, embed_model=MockEmbedding(embed_dim=4))


@pytest.fixture
def instrumented(
    index: VectorStoreIndex, tracer: StageTracer, recorded: RecordedStages
) -> Iterator[LlamaIndexInstrumentation]:
    with instrument_llama_index(tracer) as made:
        yield made
        if left_open(made) != (0, 0, 0):
            gc.collect()  # what a test still refers to
        assert left_open(made) == (0, 0, 0)
    assert context.finders == ()
    assert (recorded.refused, recorded.notes) == ({}, {})


def left_open(instrumented: LlamaIndexInstrumentation) -> tuple[int, int, int]:
    spans = instrumented._spans
    return len(spans), len(spans.observed), len(spans._streams)


def outline(text: str) -> str:
    return "\n".join(line[8:] for line in text.strip("\n").splitlines()).rstrip()


QUERIED = outline("""
        chain
          input
          retrieval
            embedding
          rerank
          chain
            system_prompt
            output
""")
#: How a chat engine answers, below itself.
ANSWERED = "  chain\n    system_prompt\n    output" if CHATS_SYNTHESIZE else "  system_prompt\n  output"


def query_engine(index: VectorStoreIndex, model: Model, **options: Any) -> Any:
    return index.as_query_engine(llm=model, node_postprocessors=[SimilarityPostprocessor()], **options)


def memory() -> ChatMemoryBuffer:
    """The memory that newer chats have is a database, which they never close."""
    return ChatMemoryBuffer.from_defaults(token_limit=3000)


def read(response: Any) -> str:
    return "".join(response.response_gen)


async def aread(response: Any) -> str:
    # The one is an attribute of a query's response, the other a method of a chat's.
    words: AsyncIterator[str] = (
        response.response_gen if hasattr(response, "get_formatted_sources") else response.async_response_gen()
    )
    return "".join([word async for word in words])


# -- query engines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_a_query_engine_is_a_tree_with_all_that_metrics_need(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages, is_async: bool
) -> None:
    engine = query_engine(index, Model())
    response = asyncio.run(engine.aquery("얼마?")) if is_async else engine.query("얼마?")
    assert str(response) == "The sum is 1억원"
    assert [found.node.node_id for found in response.source_nodes] == recorded.find("rerank").attributes["doc_ids"]

    assert recorded.outline() == QUERIED
    (root,) = recorded.roots
    assert root.event.stage_name == "RetrieverQueryEngine"
    assert root.attributes == {"query": "얼마?", "answer": "The sum is 1억원"}
    assert recorded.find("input").attributes == {"query": "얼마?"}
    retrieval = recorded.find("retrieval")
    assert retrieval.event.stage_name == "VectorIndexRetriever"
    assert retrieval.attributes["query"] == "얼마?"
    assert retrieval.attributes["top_k"] == len(retrieval.attributes["doc_ids"]) == 2
    assert retrieval.attributes["scores"] == [pytest.approx(1.0)] * 2
    rerank = recorded.find("rerank").attributes
    assert (rerank["input_count"], rerank["output_count"], len(rerank["scores"])) == (2, 2, 2)
    assert "{context_str}" in recorded.find("system_prompt").attributes["prompt"]
    assert recorded.find("embedding").attributes["text_count"] == 1
    assert recorded.find("output").attributes == {
        "model": "model-1",
        "tokens_in": 50,
        "tokens_out": 5,
        "finish_reason": "stop",
        "citations": retrieval.attributes["doc_ids"],
        "answer": "The sum is 1억원",
    }


@pytest.mark.parametrize("is_async", [False, True])
def test_a_streaming_query_lasts_until_its_stream_was_read(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages, is_async: bool
) -> None:
    async def ask() -> str:
        return await aread(await engine.aquery("얼마?"))

    with FakeClock() as clock:
        engine = query_engine(index, Model(clock=clock), streaming=True)
        if is_async:
            assert asyncio.run(ask()) == "The sum is 1억원"
        else:
            response = engine.query("얼마?")
            assert recorded.outline().count("chain") == 0, "what streams is open"
            assert read(response) == "The sum is 1억원"
    assert recorded.outline() == QUERIED
    (root,) = recorded.roots
    assert root.event.duration_ms == root.find("chain").event.duration_ms == 5_000
    assert root.attributes["answer"] == "The sum is 1억원"
    output = recorded.find("output")
    assert output.event.duration_ms == 5_000
    assert output.attributes["time_to_first_token_ms"] == 2_000
    assert output.attributes["answer"] == "The sum is 1억원"


@pytest.mark.parametrize("steps", [0, 1])
def test_a_stream_that_is_given_up_is_cancelled(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages, steps: int
) -> None:
    response = query_engine(index, Model(), streaming=True).query("얼마?")
    for _ in range(steps):
        next(response.response_gen)
    del response
    gc.collect()
    (root,) = recorded.roots
    assert (root.status, root.attributes["cancelled_by"]) == ("cancelled", "GeneratorExit")
    assert {stage.event.stage_name for stage in root._all() if stage.status == "cancelled"} >= {"CompactAndRefine"}


def test_a_stream_that_fails_fails_with_its_error(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    response = query_engine(index, Model(fails=True), streaming=True).query("얼마?")
    with pytest.raises(BrokenError, match="no more words"):
        read(response)
    for stage in (recorded.roots[0], recorded.find("output")):
        assert (stage.status, stage.attributes["error"]["message"]) == ("error", "no more words")


def test_errors_are_recorded_where_they_pass_and_reach_the_program(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    with pytest.raises(BrokenError, match="no model"):
        query_engine(index, Model(fails=True)).query("얼마?")
    assert recorded.outline() == (
        "chain (error)\n  input\n  retrieval\n    embedding\n  rerank\n  chain (error)\n    system_prompt\n"
        "    output (error)"
    )
    assert recorded.find("output").attributes["error"]["message"] == "no model"


def test_sub_questions_are_requests_within_the_request(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    model = Model()
    tool = QueryEngineTool(query_engine=index.as_query_engine(llm=model), metadata=ToolMetadata("all", name="docs"))
    engine = SubQuestionQueryEngine.from_defaults(
        [tool], llm=model, question_gen=LLMQuestionGenerator.from_defaults(llm=model), use_async=False, verbose=False
    )
    assert str(engine.query("얼마?")) == "The sum is 1억원"
    assert recorded.outline() == outline("""
        chain
          input
          query_rewrite
          chain
            retrieval
              embedding
            chain
              system_prompt
              output
          chain
            retrieval
              embedding
            chain
              output
          chain
            output
    """)
    rewrite = recorded.find("query_rewrite")
    assert rewrite.event.stage_name == "LLMQuestionGenerator"
    assert rewrite.attributes == {
        "query": "얼마?",
        "rewritten": ["A?", "B?"],
        "model": "model-1",
        "tokens_in": 50,
        "tokens_out": 5,
        "finish_reason": "stop",
    }
    found = recorded.roots[0].children[2].find("retrieval").attributes["doc_ids"]
    assert recorded.roots[0].children[-1].find("output").attributes["citations"] == found


@pytest.mark.parametrize("is_async", [False, True])
def test_a_fusion_retriever_rewrites_and_retrieves_for_every_query(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages, is_async: bool
) -> None:
    retriever = QueryFusionRetriever([index.as_retriever()], llm=Model(answer="more?"), num_queries=2, use_async=False)
    found = asyncio.run(retriever.aretrieve("얼마?")) if is_async else retriever.retrieve("얼마?")
    assert len(found) == 2
    assert recorded.outline() == outline("""
        retrieval
          input
          query_rewrite
          retrieval
            embedding
          retrieval
            embedding
    """)
    (root,) = recorded.roots
    assert recorded.find("query_rewrite").attributes["query"] == "얼마?"
    assert recorded.find("query_rewrite").attributes["rewritten"] == "more?"
    assert sorted(stage.attributes["query"] for stage in root.children if stage.stage_type == "retrieval") == [
        "more?",
        "얼마?",
    ]


def test_a_hypothetical_document_is_a_rewritten_query(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    model = Model()
    TransformQueryEngine(index.as_query_engine(llm=model), HyDEQueryTransform(llm=model)).query("얼마?")
    rewrite = recorded.find("query_rewrite")
    assert rewrite.event.stage_name == "HyDEQueryTransform"
    assert rewrite.attributes["rewritten"] == ["The sum is 1억원", "얼마?"]
    assert [event.stage_type for event in recorded.events].count("output") == 1


# -- chat engines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_a_streaming_chat_lasts_until_its_answer_and_its_second_question_is_condensed(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages, is_async: bool
) -> None:
    async def chat() -> list[str]:
        return [await aread(await engine.astream_chat(question)) for question in ("얼마?", "왜?")]

    with FakeClock() as clock:
        engine = CondensePlusContextChatEngine.from_defaults(
            index.as_retriever(), llm=Model(clock=clock), memory=memory(), system_prompt="Be kind."
        )
        if is_async:
            answers = asyncio.run(chat())
        else:
            answers = []
            for question in ("얼마?", "왜?"):
                answers.append(read(engine.stream_chat(question)))
    assert answers == ["The sum is 1억원"] * 2
    assert recorded.outline() == (
        f"chain\n  input\n  retrieval\n    embedding\n{ANSWERED}\n"
        f"chain\n  input\n  query_rewrite\n  retrieval\n    embedding\n{ANSWERED}"
    )
    for root, question in zip(recorded.roots, ("얼마?", "왜?"), strict=True):
        assert root.event.stage_name == "CondensePlusContextChatEngine"
        assert root.attributes == {"query": question, "answer": "The sum is 1억원"}
        assert root.event.duration_ms == 5_000
        assert "Be kind." in root.find("system_prompt").attributes["prompt"]
        output = root.find("output")
        assert output.attributes["time_to_first_token_ms"] == 2_000
        assert output.attributes["citations"] == root.find("retrieval").attributes["doc_ids"]
    rewrite = recorded.roots[1].find("query_rewrite")
    assert (rewrite.attributes["query"], rewrite.attributes["rewritten"]) == ("왜?", "The sum is 1억원")


def test_a_chat_over_a_query_engine_streams_through_both(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    engine = CondenseQuestionChatEngine.from_defaults(
        query_engine(index, Model(), streaming=True), llm=Model(), memory=memory()
    )
    response = engine.stream_chat("얼마?")
    assert read(response) == "The sum is 1억원"
    nested = "\n".join(f"  {line}" for line in QUERIED.replace("  input\n", "").splitlines())
    assert recorded.outline() == f"chain\n  input\n{nested}"
    assert recorded.roots[0].attributes["answer"] == "The sum is 1억원"


def test_a_chat_without_retrieval_has_its_system_message_and_no_rewriting(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    SimpleChatEngine.from_defaults(llm=Model(), memory=memory(), system_prompt="Be kind.").chat("얼마?")
    assert recorded.outline() == "chain\n  input\n  system_prompt\n  output"
    assert recorded.find("system_prompt").attributes == {"prompt": "Be kind."}
    assert "citations" not in recorded.find("output").attributes


def test_a_plain_model_call_is_a_request_of_its_own(
    tracer: StageTracer, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    messages = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="얼마?")]
    Model().chat(messages)
    assert recorded.outline() == "output\n  system_prompt\n  input"
    recorded.clear()
    Model().complete("얼마?")
    assert recorded.find("input").attributes == {"query": "얼마?"}
    recorded.clear()
    with tracer.stage("request"):
        list(Model().stream_chat(messages))
    assert recorded.outline() == "request\n  output\n    system_prompt"


# -- workflows and agents ----------------------------------------------------------------------------


class Found(Event):
    question: str


def test_a_workflow_has_its_steps_and_the_programs_own_stages(
    index: VectorStoreIndex, tracer: StageTracer, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    class Answering(Workflow):
        @step
        async def look_up(self, ev: StartEvent) -> Found:
            current_stage().set(own="yes")
            with tracer.stage("checking"):
                await index.as_retriever().aretrieve(ev.question)
            return Found(question=ev.question)

        @step
        async def write(self, ev: Found) -> StopEvent:
            return StopEvent(result=await Model().apredict(PromptTemplate("Answer {question}"), question=ev.question))

    async def run() -> None:
        assert await Answering().run(question="얼마?") == "The sum is 1억원"
        assert str(await query_engine(index, Model()).aquery("또?")) == "The sum is 1억원"

    asyncio.run(run())
    answering = outline("""
        chain
          input
          chain
            checking
              retrieval
                embedding
          chain
            system_prompt
            output
    """)
    assert recorded.outline() == f"{answering}\n{QUERIED}"
    root = recorded.roots[0]
    assert (root.event.stage_name, root.attributes) == ("Answering", {"query": "얼마?", "answer": "The sum is 1억원"})
    steps = [stage for stage in root.children if stage.stage_type == "chain"]
    assert [stage.event.stage_name for stage in steps] == ["look_up", "write"]
    assert steps[0].attributes == {"own": "yes"}
    assert recorded.roots[0].find("output").attributes["citations"] == root.find("retrieval").attributes["doc_ids"]


def test_a_step_that_is_retried_is_an_attempt_after_the_other(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    policies = pytest.importorskip("llama_index.core.workflow.retry_policy")
    tries = []

    class Trying(Workflow):
        @step(retry_policy=policies.ConstantDelayRetryPolicy(maximum_attempts=3, delay=0.01))
        async def attempt(self, ev: StartEvent) -> StopEvent:
            tries.append(1)
            if len(tries) < 3:
                raise BrokenError("not yet")
            return StopEvent(result="done")

    async def run() -> Any:
        return await Trying().run(input="얼마?")

    assert asyncio.run(run()) == "done"
    steps = [stage for stage in recorded.roots[0].children if stage.event.stage_name == "attempt"]
    assert [(stage.event.attempt, stage.status) for stage in steps] == [(1, "error"), (2, "error"), (3, "success")]


def test_a_workflow_that_fails_fails_with_its_error(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    class Failing(Workflow):
        @step
        async def fail(self, ev: StartEvent) -> StopEvent:
            raise BrokenError("no step")

    async def run() -> None:
        with pytest.raises(Exception, match="no step"):
            await Failing().run(input="얼마?")

    asyncio.run(run())
    assert recorded.outline() == "chain (error)\n  input\n  chain (error)"


async def ask_agent(tools: list[Any], model: Model, question: str) -> Any:
    import llama_index.core.agent as agents

    agent: Any = agents.ReActAgent
    if hasattr(agent, "from_tools"):  # before agents were workflows
        return await agent.from_tools(tools, llm=model).achat(question)
    return await agent(tools=tools, llm=model).run(question)


def test_a_workflow_that_is_cancelled_says_so(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    class Waiting(Workflow):
        @step
        async def wait(self, ev: StartEvent) -> StopEvent:
            await asyncio.Event().wait()
            return StopEvent()

    async def run() -> None:
        running: Any = asyncio.ensure_future(Waiting().run(input="얼마?"))
        while len(instrumented._spans.observed) < 2:
            await asyncio.sleep(0)
        if hasattr(running, "cancel_run"):
            await running.cancel_run()
        else:
            running.cancel()
        with pytest.raises(BaseException):  # noqa: B017, PT011 - each version has an error of its own
            await running

    asyncio.run(asyncio.wait_for(run(), 10))
    assert recorded.outline() == "chain (cancelled)\n  input\n  chain (cancelled)"


def test_an_agent_has_its_model_calls_and_its_tools(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    class Thinking(Model):
        def _reply(self, prompt: str) -> str:
            if "Observation: 3" in prompt:
                return "Thought: I can answer without using any more tools.\nAnswer: 3"
            return 'Thought: I need a tool.\nAction: add\nAction Input: {"a": 1, "b": 2}'

        @llm_completion_callback()
        def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
            text = self._reply(prompt)
            return (CompletionResponse(text=text, delta=text) for _ in range(1))

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    answer = asyncio.run(ask_agent([FunctionTool.from_defaults(add)], Thinking(), "1 + 2?"))
    assert str(answer) == "3"
    assert recorded.outline() == "agent\n  input\n  system_prompt\n  output\n  tool\n  output"
    assert recorded.roots[0].attributes == {"query": "1 + 2?", "answer": "3"}
    tool = recorded.find("tool")
    assert tool.event.stage_name == "add"
    assert tool.attributes == {"tool_name": "add", "arguments": {"a": 1, "b": 2}, "result": "3"}


# -- inside the program ------------------------------------------------------------------------------


class OwnRetriever(BaseRetriever):
    """A retriever of the program's own, with a stage of its own."""

    def __init__(self, tracer: StageTracer, before: Callable[[str], None] = lambda query: None) -> None:
        super().__init__()
        self._tracer, self._before = tracer, before

    def _retrieve(self, query_bundle: Any) -> list[NodeWithScore]:
        with self._tracer.stage("scoring"):
            self._before(query_bundle.query_str)
            return [NodeWithScore(node=TextNode(text="보험", id_=query_bundle.query_str), score=0.5)]


def test_stages_of_the_program_are_around_and_inside(
    tracer: StageTracer, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    with tracer.stage("request"):
        OwnRetriever(tracer).retrieve("얼마?")
        tracer.record_stage("after")
    assert recorded.outline() == "request\n  retrieval\n    input\n    scoring\n  after"
    assert len({event.trace_id for event in recorded.events}) == 1


def test_tags_are_metadata_of_the_stages_inside(
    index: VectorStoreIndex, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    with instrument_tags({"session_id": "s-1"}):
        query_engine(index, Model()).query("얼마?")
    assert [event.metadata for event in recorded.events] == [{"session_id": "s-1"}] * 8


def test_functions_of_the_program_that_are_spans_are_stages(
    instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    span = get_dispatcher("program").span

    @span
    def prepare(question: str) -> Iterator[str]:
        yield from (question, Model().complete(question).text)

    assert list(prepare("얼마?")) == ["얼마?", "The sum is 1억원"]
    gc.collect()
    assert recorded.outline() == "chain\n  output"
    assert recorded.roots[0].event.stage_name == "prepare"


def test_concurrent_requests_keep_their_own(
    tracer: StageTracer, instrumented: LlamaIndexInstrumentation, recorded: RecordedStages
) -> None:
    together = threading.Barrier(4, timeout=20)

    def before(query: str) -> None:
        together.wait()

    from llama_index.core.query_engine import RetrieverQueryEngine

    engine = RetrieverQueryEngine.from_args(OwnRetriever(tracer, before), llm=Model(), streaming=True)

    def ask(number: int) -> str:
        return read(engine.query(f"q{number}"))

    async def ask_all() -> list[str]:
        quick = RetrieverQueryEngine.from_args(OwnRetriever(tracer), llm=Model(), streaming=True)
        responses = await asyncio.gather(*(quick.aquery(f"a{number}") for number in range(20)))
        return list(await asyncio.gather(*map(aread, responses)))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(20))) == ["The sum is 1억원"] * 20
    assert asyncio.run(ask_all()) == ["The sum is 1억원"] * 20
    roots = recorded.roots
    assert len(roots) == 40
    for root in roots:
        assert root.outline() == "chain\n  input\n  retrieval\n    scoring\n  chain\n    system_prompt\n    output"
        assert root.find("retrieval").attributes["doc_ids"] == [root.attributes["query"]]
        assert root.find("output").attributes["citations"] == [root.attributes["query"]]
        assert {stage.event.trace_id for stage in root._all()} == {root.event.trace_id}
    assert len({root.event.trace_id for root in roots}) == 40


def test_what_never_ends_is_given_up(
    tracer: StageTracer, index: VectorStoreIndex, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.integrations.llama_index.spans._MAX_SPANS", 10)
    with instrument_llama_index(tracer) as instrumented:
        instrumented._spans.observed._max_open = 3
        waiting = [query_engine(index, Model(), streaming=True).query(f"q{number}") for number in range(20)]
        assert left_open(instrumented)[0] <= 10
        assert left_open(instrumented)[1] <= 4
        assert sum(event.status == "cancelled" for event in recorded.events) >= 36
        assert [read(response) for response in waiting] == ["The sum is 1억원"] * 20
        del waiting
        gc.collect()
        assert left_open(instrumented)[1:] == (0, 0)


def test_objects_that_cannot_be_read_cost_nothing_but_their_attributes(
    tracer: StageTracer, index: VectorStoreIndex, recorded: RecordedStages
) -> None:
    class Odd(OwnRetriever):
        @property
        def similarity_top_k(self) -> int:
            raise BrokenError("nobody knows")

    class Text(str):
        def __class__(self) -> type:  # type: ignore[override]
            raise BrokenError("no class")

    with instrument_llama_index(tracer):
        assert len(Odd(tracer).retrieve("얼마?")) == 1
    assert recorded.outline() == "retrieval\n  input\n  scoring"
    assert recorded.refused == {}


def test_a_fault_of_ours_is_counted_and_the_program_goes_on(
    index: VectorStoreIndex, tracer: StageTracer, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise BrokenError("a fault of ours")

    for function in ("ids_of", "call_ended", "answer_of"):
        monkeypatch.setattr(reading, function, fail)
    with instrument_llama_index(tracer) as instrumented:
        assert str(query_engine(index, Model()).query("얼마?")) == "The sum is 1억원"
        assert read(query_engine(index, Model(), streaming=True).query("얼마?")) == "The sum is 1억원"
        assert left_open(instrumented)[1] == 0
    assert recorded.notes["hook_errors"] > 5
    assert recorded.outline() == f"{QUERIED}\n{QUERIED}"


# -- on and off --------------------------------------------------------------------------------------


def handlers() -> tuple[list[int], list[int]]:
    root = get_dispatcher()
    return list(map(id, root.span_handlers)), list(map(id, root.event_handlers))


def test_it_is_instrumented_once_and_undone_to_what_it_was(
    index: VectorStoreIndex, tracer: StageTracer, recorded: RecordedStages
) -> None:
    before = handlers()
    instrumented = instrument_llama_index(tracer)
    during = handlers()
    assert instrument_llama_index(tracer) is instrumented
    assert handlers() == during != before
    engine = query_engine(index, Model(), streaming=True)
    response = engine.query("얼마?")
    instrumented.undo()
    instrumented.undo()
    assert handlers() == before
    assert context.finders == ()
    assert read(response) == "The sum is 1억원"
    assert {event.attributes["cancelled_by"] for event in recorded.events if event.status == "cancelled"} == {"undone"}
    recorded.clear()
    assert read(engine.query("얼마?")) == "The sum is 1억원"
    assert recorded.events == []
    assert instrument_llama_index(tracer) is not instrumented
    instrument_llama_index(tracer).undo()
    assert handlers() == before


def test_without_a_tracer_the_packages_own_records(index: VectorStoreIndex) -> None:
    with record_stages() as recorded, instrument_llama_index():
        query_engine(index, Model()).query("얼마?")
    assert recorded.outline() == QUERIED


def test_a_tracer_that_is_off_costs_no_stage(index: VectorStoreIndex) -> None:
    with StageTracer("r", enabled=False) as tracer, instrument_llama_index(tracer) as instrumented:
        assert str(query_engine(index, Model()).query("얼마?")) == "The sum is 1억원"
        assert left_open(instrumented) == (0, 0, 0)


def test_without_llama_index_the_error_says_what_to_install() -> None:
    script = "import sys; sys.modules['llama_index'] = None; import evalvault_sdk.integrations.llama_index"
    assert "pip install 'evalvault-sdk[llama-index]'" in run_script(script).stderr


# -- what providers answer with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        {
            "raw": SimpleNamespace(
                usage=SimpleNamespace(prompt_tokens=9, completion_tokens=4), choices=[{"finish_reason": "stop"}]
            )
        },
        {"raw": {"usage": SimpleNamespace(input_tokens=9, output_tokens=4), "stop_reason": "stop"}},
        {"raw": {"prompt_eval_count": 9, "eval_count": 4, "done_reason": "stop"}},
        {
            "raw": {
                "usage_metadata": {"prompt_token_count": 9, "candidates_token_count": 4},
                "candidates": [{"finish_reason": SimpleNamespace(value="stop")}],
            }
        },
        {"additional_kwargs": {"prompt_tokens": 9, "completion_tokens": 4, "finish_reason": "stop"}},
    ],
    ids=["openai", "anthropic", "ollama", "gemini", "additional"],
)
def test_tokens_and_finish_reason_are_read_from_each_providers_answer(response: dict[str, Any]) -> None:
    _, attributes = reading.call_ended(SimpleNamespace(response=SimpleNamespace(text="...", **response)))
    assert attributes == {"tokens_in": 9, "tokens_out": 4, "finish_reason": "stop"}


def test_the_settings_of_a_call_win_over_those_of_its_model() -> None:
    event = SimpleNamespace(model_dict={"model": "gpt-4", "temperature": 0.1}, additional_kwargs={"temperature": 0.7})
    assert reading.call_begun(event, None) == {"model": "gpt-4", "temperature": 0.7}


def test_what_is_open_when_the_tracer_ends_is_recorded(tracer: StageTracer, recorded: RecordedStages) -> None:
    with instrument_llama_index(tracer) as instrumented:
        instrumented._spans.observed.begin("query-1", None, "chain")
        tracer.shutdown(0.1)
    assert (recorded.find("chain").status, recorded.find("chain").attributes) == (
        "cancelled",
        {"cancelled_by": "shutdown"},
    )
