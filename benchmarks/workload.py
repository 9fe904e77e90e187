"""
What is recorded: RAG requests of a root and four stages, the same ones for every SDK.

In:   how many requests, and how many bytes of text each stage is to carry besides.
Out:  the stages' attributes: Korean and English text, ten ids, ten scores. Every request has others, for bodies that
      repeat themselves pack better than any that a program sends.

As EvalVault's JSON a stage is about 450 bytes, of which ids, times and names are 350 (`tests/test_benchmarks.py`).
"""

from __future__ import annotations

import random
from typing import Any

Attributes = dict[str, Any]

ROOT_TYPE = "request"
#: Inside the root, one after the other.
STAGE_TYPES = ("query_rewrite", "retrieval", "rerank", "output")
STAGES_PER_REQUEST = 1 + len(STAGE_TYPES)
_KOREAN = ("보험", "보장금액", "사망보험금", "청구", "서류", "지급", "기한", "해지", "환급금", "특약", "면책", "계약자")
_ENGLISH = ("policy", "benefit", "claim", "paid", "within", "days", "insured", "rider", "premium", "value", "renewal")
_TEXT_CHARACTERS = 200_000


def attributes_of(requests: int, text_bytes: int = 0) -> list[Attributes]:
    """
    Return the attributes of all stages of some requests, in order: root, query_rewrite, retrieval, rerank, output.

    With `text_bytes` each stage has a list of passages besides, of 1 KB each.
    """
    some = random.Random(7)

    def text(words: tuple[str, ...], count: int) -> str:
        return " ".join(some.choices(words, k=count))

    library = text(_KOREAN + _ENGLISH, _TEXT_CHARACTERS // 5) if text_bytes else ""

    def passage() -> str:
        start = some.randrange(len(library) - 1000)
        return library[start : start + 1000].encode()[:1000].decode(errors="ignore")

    made: list[Attributes] = []
    for _ in range(requests):
        doc_ids = [f"doc-{some.randrange(1000, 9999)}" for _ in range(10)]
        scores = sorted((round(some.random(), 3) for _ in doc_ids), reverse=True)
        made += (
            {"query": text(_KOREAN, 3), "user": f"u-{some.randrange(9999)}"},
            {"rewritten": text(_ENGLISH, 4), "language": "ko"},
            {"doc_ids": doc_ids, "scores": scores, "top_k": 10},
            {"doc_ids": doc_ids[:3], "scores": scores[:3], "input_count": 10, "output_count": 3},
            {"answer": f"{text(_KOREAN, 2)} ({text(_ENGLISH, 2)})", "citations": doc_ids[:1], "tokens_out": 208},
        )
    if text_bytes:
        for attributes in made:
            attributes["passages"] = [passage() for _ in range(text_bytes // 1000)]
    return made
