"""
LangChain and LangGraph as the extra `[langchain]`: their runs become stages.

In:   callbacks of `langchain-core` 0.3 and 1.x, from a handler given to a call, or from all calls of a program::

    from evalvault_sdk.integrations.langchain import EvalVaultCallbackHandler, instrument_langchain

    chain.invoke(question, config={"callbacks": [EvalVaultCallbackHandler(tracer)]})

    instrument_langchain(tracer)

Out:  `input`, `query_rewrite`, `retrieval`, `rerank`, `system_prompt`, `output`, and `chain`, `agent`, `tool`, `parser`
      under their own names, in a tree, with the attributes that metrics are computed from.
"""

from __future__ import annotations

from evalvault_sdk.integrations.langchain.handler import EvalVaultCallbackHandler
from evalvault_sdk.integrations.langchain.instrument import LangChainInstrumentation, instrument_langchain

__all__ = ["EvalVaultCallbackHandler", "LangChainInstrumentation", "instrument_langchain"]
