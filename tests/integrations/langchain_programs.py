"""Small programs of LangChain's kinds, with models that say what they are told: for versions from 0.3 on."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypedDict

from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnablePassthrough
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from pydantic import Field

PROMPT = ChatPromptTemplate.from_messages([("system", "Cite.\n{context}"), ("human", "{question}")])


class Passages(BaseRetriever):
    """Finds two passages for everything."""

    k: int = 2

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Document]:
        return [
            Document(page_content=f"about {query}", metadata={"id": f"{query}-{number}", "score": 1 / number})
            for number in (1, 2)
        ]


class KeepFirst(BaseDocumentCompressor):
    """Keeps the first document."""

    top_n: int = 1

    def compress_documents(self, documents: Sequence[Document], query: str, callbacks: Any = None) -> list[Document]:
        return [
            Document(page_content=document.page_content, metadata={**document.metadata, "relevance_score": 0.9})
            for document in documents[: self.top_n]
        ]


class Scripted(BaseChatModel):
    """Says what it was given, one thing after another and then from the beginning; else it echoes the question."""

    says: list[Any] = Field(default_factory=list)
    said: list[int] = Field(default_factory=list)
    model: str = "scripted-1"
    temperature: float = 0.5

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _next(self, messages: list[BaseMessage]) -> AIMessage:
        self.said.append(1)
        saying = self.says[(len(self.said) - 1) % len(self.says)] if self.says else f"echo {messages[-1].content}"
        if isinstance(saying, BaseException):
            raise saying
        if isinstance(saying, AIMessage):
            return saying
        return AIMessage(
            content=saying,
            usage_metadata={"input_tokens": 10, "output_tokens": 4, "total_tokens": 14},
            response_metadata={"finish_reason": "stop"},
        )

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next(messages))])

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        whole = self._next(messages)
        chunks = [AIMessageChunk(content=word) for word in str(whole.content).split(" ")]
        chunks.append(AIMessageChunk(content="", usage_metadata=whole.usage_metadata))
        for chunk in chunks:
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.content, chunk=ChatGenerationChunk(message=chunk))
            yield ChatGenerationChunk(message=chunk)

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def said(text: str, **tool_call: Any) -> AIMessage:
    """Return a message that calls a tool, if one is given."""
    if not tool_call:
        return AIMessage(content=text)
    call = {"name": tool_call.pop("name"), "args": tool_call, "id": "call-1", "type": "tool_call"}
    return AIMessage(content=text, tool_calls=[call])


def joined(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


def rag_chain(model: BaseChatModel | None = None) -> Runnable[str, str]:
    """Return a chain of LCEL: retrieve, prompt, answer."""
    given = {"context": Passages() | joined, "question": RunnablePassthrough()}
    return given | PROMPT | (model or Scripted()) | StrOutputParser()


@tool
def search(query: str) -> str:
    """Search the passages."""
    return joined(Passages().invoke(query))


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    return f"sunny in {city}"


def agent() -> Any:
    """Return an agent that asks for the weather, then searches, then answers."""
    model = Scripted(
        says=[said("", name="weather", city="Seoul"), said("", name="search", query="umbrella"), "Take none."]
    )
    try:
        from langchain.agents import create_agent
    except ImportError:
        from langgraph.prebuilt import create_react_agent

        return create_react_agent(model, [weather, search], state_modifier="Be brief.")
    return create_agent(model, [weather, search], system_prompt="Be brief.")


class State(TypedDict, total=False):
    question: str
    passages: list[Document]
    tries: Annotated[int, operator.add]
    text: str


def graph() -> Any:
    """
    Return a graph with a loop (rewrite and retrieve, twice) and a branch (answer, or give up).

    Its nodes hand their config on, as LangGraph wants it for `ainvoke` before Python 3.11.
    """
    rewriter = Scripted(says=["first try", "second try"])
    answering = PROMPT | Scripted(says=["It is so."]) | StrOutputParser()

    def rewrite(state: State, config: RunnableConfig) -> State:
        return {"question": str(rewriter.invoke([HumanMessage(state["question"])], config).content), "tries": 1}

    def retrieve(state: State, config: RunnableConfig) -> State:
        return {"passages": Passages().invoke(state["question"], config)}

    def is_enough(state: State) -> str:
        return "answer" if state["tries"] == 2 else "rewrite"

    def answer(state: State, config: RunnableConfig) -> State:
        given = {"context": joined(state["passages"]), "question": state["question"]}
        return {"text": answering.invoke(given, config)}

    def give_up(state: State) -> State:
        return {"text": "no"}

    building = StateGraph(State)
    for node in (rewrite, retrieve, answer, give_up):
        building.add_node(node.__name__, node)
    building.add_edge(START, "rewrite")
    building.add_edge("rewrite", "retrieve")
    building.add_conditional_edges("retrieve", is_enough, ["rewrite", "answer", "give_up"])
    building.add_edge("answer", END)
    building.add_edge("give_up", END)
    return building.compile()
