"""`instrument_langchain()`: a whole program is recorded, without touching its code, until it is undone."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda

import evalvault_sdk
from evalvault_sdk import StageTracer
from evalvault_sdk.integrations.langchain import EvalVaultCallbackHandler, instrument_langchain
from evalvault_sdk.testing import RecordedStages, record_stages
from tests.integrations.langchain_programs import KeepFirst, Passages, Scripted, rag_chain

LCEL = "chain\n  input\n  retrieval\n  chain\n  system_prompt\n  output\n  parser"


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages
        assert stages.refused == {}


def test_every_run_is_recorded_until_it_is_undone(tracer: StageTracer, recorded: RecordedStages) -> None:
    instrumentation = instrument_langchain(tracer)
    assert rag_chain().invoke("q") == "echo q"
    assert recorded.outline() == LCEL
    instrumentation.undo()
    instrumentation.undo()
    rag_chain().invoke("q")
    assert recorded.outline() == LCEL


def test_other_threads_and_tasks_are_recorded_too(tracer: StageTracer, recorded: RecordedStages) -> None:
    with instrument_langchain(tracer):
        thread = threading.Thread(target=rag_chain().invoke, args=("q",))
        thread.start()
        thread.join()
        asyncio.run(rag_chain().ainvoke("q"))
    assert recorded.outline() == f"{LCEL}\n{LCEL}"


def test_it_may_be_called_again_and_records_each_run_once(tracer: StageTracer, recorded: RecordedStages) -> None:
    with instrument_langchain(tracer) as first:
        assert instrument_langchain(tracer) is first
        rag_chain().invoke("q")
    assert recorded.outline() == LCEL
    with instrument_langchain(tracer):
        rag_chain().invoke("q")
    assert recorded.outline() == f"{LCEL}\n{LCEL}"


def test_without_a_tracer_it_is_the_packages_own_and_another_tracer_takes_its_place(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    with record_stages() as own:
        first = instrument_langchain()
        Passages().invoke("q")
        second = instrument_langchain(tracer)
        Passages().invoke("q")
        first.undo()
        Passages().invoke("q")
        second.undo()
        Passages().invoke("q")
    assert (len(own), len(recorded)) == (1, 2)


def test_instrument_of_the_package_is_the_same(tracer: StageTracer, recorded: RecordedStages) -> None:
    with evalvault_sdk.instrument("langchain", tracer=tracer) as done:
        assert done.instrumented == ("langchain",)
        Passages().invoke("q")
    Passages().invoke("q")
    assert recorded.outline() == "retrieval"


def test_a_handler_that_is_given_as_well_records_nothing_twice(tracer: StageTracer, recorded: RecordedStages) -> None:
    with instrument_langchain(tracer):
        rag_chain().invoke("q", {"callbacks": [EvalVaultCallbackHandler(tracer)]})
    assert recorded.outline() == LCEL


class KeepAll(KeepFirst):
    """Inherits one method, and calls the inherited other."""

    top_n: int = 2

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> list[Document]:
        return self.compress_documents(documents, query, callbacks)


@pytest.mark.parametrize("compressor", [KeepFirst(), KeepAll()], ids=["KeepFirst", "KeepAll"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_compressor_that_is_called_anywhere_is_a_rerank(
    tracer: StageTracer, recorded: RecordedStages, compressor: KeepFirst, is_async: bool
) -> None:
    def rerank(question: str) -> Any:
        documents = Passages().invoke(question)
        if is_async:
            return asyncio.run(compressor.acompress_documents(documents, question))
        return compressor.compress_documents(documents, question)

    before = RunnableLambda(rerank).invoke("q")
    with instrument_langchain(tracer):
        assert RunnableLambda(rerank).invoke("q") == before
    assert recorded.outline() == "chain\n  input\n  retrieval\n  rerank"
    attributes = recorded.find("rerank").attributes
    assert (attributes["query"], attributes["input_count"]) == ("q", 2)
    assert attributes["output_count"] == attributes["top_k"] == compressor.top_n
    assert attributes["scores"] == [0.9] * compressor.top_n


def test_a_compressor_that_asks_a_model_and_is_made_later_is_a_rerank_with_an_llm(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    model = Scripted(says=["9"])
    with instrument_langchain(tracer):

        class Asking(BaseDocumentCompressor):
            def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
                model.invoke(query, {"callbacks": callbacks})
                return documents[:1]

        Asking().compress_documents(Passages().invoke("q"), "q")
    assert recorded.outline() == "retrieval\nrerank\n  llm"
    assert not hasattr(Asking.compress_documents, "_evalvault_wraps")


def test_a_compressors_error_passes_through(tracer: StageTracer, recorded: RecordedStages) -> None:
    class Broken(BaseDocumentCompressor):
        def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
            raise ValueError("broken")

    with instrument_langchain(tracer), pytest.raises(ValueError, match="broken"):
        Broken().compress_documents([], "q")
    assert recorded.outline() == "rerank (error)"
    assert recorded.find("rerank").attributes["input_count"] == 0


def test_what_we_cannot_read_of_a_compressor_is_no_concern_of_the_programs(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    class Odd(BaseDocumentCompressor):
        @property
        def top_n(self) -> int:
            raise RuntimeError("not yet")

        def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
            return iter(documents)

    with instrument_langchain(tracer):
        assert list(Odd().compress_documents([], query="q")) == []
    assert recorded.notes.pop("hook_errors") == 1
    assert len(recorded) == 0


def test_a_compressor_that_is_closed_in_another_context_closes_quietly(tracer: StageTracer) -> None:
    class Slow(BaseDocumentCompressor):
        def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
            return documents

        async def acompress_documents(self, documents: Any, query: str, callbacks: Any = None) -> Any:
            await asyncio.sleep(60)

    async def begin() -> Any:
        asyncio.get_running_loop()
        waiting: Any = Slow().acompress_documents([], "q")
        waiting.send(None)
        return waiting

    with instrument_langchain(tracer):
        waiting = asyncio.run(begin())
        contextvars.copy_context().run(waiting.close)
