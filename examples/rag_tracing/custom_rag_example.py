"""
A RAG program of your own, traced: questions about Python, answered from the standard library's docstrings.

Nothing here is canned. The program reads the docstrings of the standard library of the Python it runs on
(some thousands of passages), indexes them with BM25, and for every question detects the language, rewrites
the query (Korean terms into English ones), retrieves, reranks, and composes an extractive answer with
citations. It needs neither network nor keys.

`LLM_API_URL` is the address of a model with OpenAI's API, `http://localhost:11434/v1` for example, which then writes
the answers; with it go `LLM_MODEL` and `LLM_API_KEY`.

Three ways to record a stage are used, each where it is natural:

* a decorator, where a function is a stage: `detect_language`, `rewrite`, `compose`;
* a with-block, where a part of a function is one: the request itself, `retrieval`, `rerank`;
* `record_stage`, where there is nothing to measure: the prompt, the input, the check of the answer.

Some questions fail on purpose: some find nothing, some are in a language that the program refuses.

Run it beside a server (`evalvault-sdk serve`)::

    pip install 'evalvault-sdk[demo]'
    python custom_rag_example.py
    evalvault-sdk show custom-rag-example
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bm25s
import requests

from evalvault_sdk import StageTracer, Stats, current_stage

TOP_K = 5
KEEP = 3

# Address and token come from EVALVAULT_API_URL and EVALVAULT_API_TOKEN.
tracer = StageTracer(run_id=os.environ.get("EVALVAULT_RUN_ID", "custom-rag-example"))

SYSTEM_PROMPT = "Answer from the passages only, and cite every passage you use, as in [json.loads]."

LLM_API_URL = os.environ.get("LLM_API_URL", "").rstrip("/")
LLM_MODEL = os.environ.get("LLM_MODEL", "gpt-4o-mini") if LLM_API_URL else "extractive-1"


class UnsupportedLanguageError(ValueError):
    """The question is in a language for which there is no query rewriting."""


# ---------------------------------------------------------------- the text, and its index


@dataclass(frozen=True)
class Passage:
    """One docstring, under the dotted name of what it documents."""

    id: str
    text: str


def standard_library() -> Iterator[Passage]:
    """Yield the docstrings of the standard library, read from its source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "distutils",
        "pydoc_data",
    }
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if skipped.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _docstrings(tree, module)


def _docstrings(node: ast.AST, name: str) -> Iterator[Passage]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) > 40:
            yield Passage(name, text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            yield from _docstrings(child, f"{name}.{child.name}")


class Library:
    """The passages, and the BM25 index over them."""

    def __init__(self) -> None:
        self.passages = list(standard_library())
        self.ids = {passage.id for passage in self.passages}
        self._index = bm25s.BM25()
        # The dotted name is searched too: "json.loads" says a lot about its passage.
        texts = [f"{passage.id.replace('.', ' ').replace('_', ' ')}\n{passage.text}" for passage in self.passages]
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """Return the best passages with their scores, best first; none where no word of the query occurs."""
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
        found, scores = self._index.retrieve(tokens, k=top_k, show_progress=False)
        pairs = zip(found[0], scores[0], strict=True)
        return [(self.passages[place], float(score)) for place, score in pairs if score > 0]


# ---------------------------------------------------------------- the stages

_KOREAN_TERMS = {
    "파일": "file", "읽": "read", "쓰": "write", "줄": "line", "압축": "compress", "해제": "decompress",
    "정렬": "sort", "문자열": "string", "날짜": "date", "시간": "time", "변환": "convert", "파싱": "parse",
    "경로": "path", "디렉터리": "directory", "폴더": "directory", "삭제": "remove", "복사": "copy",
    "임시": "temporary", "스레드": "thread", "프로세스": "process", "큐": "queue", "잠금": "lock",
    "무작위": "random", "난수": "random", "평균": "mean", "중앙값": "median", "로그": "log", "로깅": "logging",
    "설정": "config", "이메일": "email", "소켓": "socket", "서버": "server", "정규식": "regular expression",
    "패턴": "pattern", "검색": "search", "캐시": "cache", "해시": "hash", "암호": "secret", "토큰": "token",
    "비동기": "asyncio", "작업": "task", "대기": "wait", "반복": "iterator", "조합": "combinations",
    "순열": "permutations", "사전": "dict", "집합": "set", "힙": "heap", "분수": "fraction", "소수": "decimal",
    "테스트": "unittest", "예외": "exception", "추적": "traceback", "환경": "environment", "변수": "variable",
    "명령": "command", "인자": "argument", "주소": "address", "데이터베이스": "database", "연결": "connection",
    "객체": "object", "직렬화": "serialize pickle", "복제": "copy deepcopy", "달력": "calendar", "표": "csv",
}  # fmt: skip
_FILLER = re.compile(r"\b(how|do|does|i|to|a|an|the|is|are|what|which|can|in|of|for|with|my|it|and|from|by)\b")
_WORD = re.compile(r"[a-z][a-z0-9]+")


@tracer.stage("language_detection")
def detect_language(question: str) -> str:
    """Return "ko" or "en", by script. Raises `UnsupportedLanguageError` for anything else."""
    letters = [letter for letter in question if letter.isalpha()]
    korean = sum("가" <= letter <= "힣" for letter in letters)
    latin = sum(letter.isascii() for letter in letters)
    language, share = ("ko", korean) if korean > latin / 4 else ("en", latin)
    confidence = share / len(letters) if letters else 0.0
    current_stage().set(predicted_label=language, confidence=confidence)
    if confidence < 0.3:
        raise UnsupportedLanguageError("only Korean and English questions are answered")
    return language


@tracer.stage("query_rewrite", metadata={"rewriter": "glossary-1"})
def rewrite(question: str, language: str) -> str:
    """Return the question as search terms in English."""
    terms = question.lower()
    if language == "ko":
        known = [english for korean, english in _KOREAN_TERMS.items() if korean in question]
        terms = " ".join([*known, *_WORD.findall(terms)])
    rewritten = " ".join(_FILLER.sub(" ", terms).replace("?", " ").split())
    current_stage().set(original=question, rewritten=rewritten, term_count=len(rewritten.split()))
    return rewritten


def rerank(query: str, candidates: list[tuple[Passage, float]]) -> list[tuple[Passage, float]]:
    """Return the candidates that cover the query best: how many of its words, and whether the name has them."""
    words = set(_WORD.findall(query)) or {query}
    best = candidates[0][1]
    scored = []
    for passage, score in candidates:
        text, name = set(_WORD.findall(passage.text.lower())), set(_WORD.findall(passage.id.lower()))
        coverage = len(words & text) / len(words)
        naming = len(words & name) / len(words)
        scored.append((passage, 0.4 * coverage + 0.3 * naming + 0.3 * score / best))
    scored.sort(key=lambda pair: -pair[1])
    return scored[:KEEP]


@tracer.stage("output", attributes={"model": LLM_MODEL})
def compose(question: str, query: str, passages: list[Passage]) -> str:
    """Return the answer, with the passages it is from in brackets."""
    answer = _ask_model(question, passages) if LLM_API_URL else _extract(query, passages)
    named = re.findall(r"\[([\w.]+)\]", answer)
    citations = [passage.id for passage in passages if passage.id in named]
    current_stage().set(answer=answer, citations=citations)
    return answer


def _ask_model(question: str, passages: list[Passage]) -> str:
    """Return what the model says (OpenAI's API, "Create chat completion")."""
    context = "\n\n".join(f"[{passage.id}]\n{passage.text}" for passage in passages)
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{context}\n\n{question}"},
    ]
    key = os.environ.get("LLM_API_KEY")
    response = requests.post(
        f"{LLM_API_URL}/chat/completions",
        json={"model": LLM_MODEL, "messages": messages, "temperature": 0},
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=(5, 60),
    )
    response.raise_for_status()
    said = response.json()
    usage = said.get("usage") or {}
    current_stage().set(
        temperature=0,
        finish_reason=said["choices"][0].get("finish_reason"),
        tokens_in=usage.get("prompt_tokens"),
        tokens_out=usage.get("completion_tokens"),
    )
    return str(said["choices"][0]["message"]["content"])


def _extract(query: str, passages: list[Passage]) -> str:
    """Return the sentences that share most words with the query, each with the passage it is from."""
    words = Counter(_WORD.findall(query))
    sentences = []
    for passage in passages:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\n", passage.text):
            overlap = sum((words & Counter(_WORD.findall(sentence.lower()))).values())
            if overlap:
                sentences.append((overlap / (1 + len(sentence) / 400), " ".join(sentence.split()), passage.id))
    sentences.sort(key=lambda entry: -entry[0])
    answer = " ".join(f"{text} [{source}]" for _, text, source in sentences[:2]) or "The passages do not say."
    current_stage().set(
        tokens_in=sum(len(passage.text.split()) for passage in passages) + len(query.split()),
        tokens_out=len(answer.split()),
    )
    return answer


def answer(library: Library, question: str, relevant: tuple[str, ...] = ()) -> str:
    """Answer one question: one request, one trace."""
    with tracer.stage("request", stage_name="ask_the_library") as request:
        tracer.record_stage("system_prompt", attributes={"prompt_id": "cite-1", "prompt": SYSTEM_PROMPT})
        tracer.record_stage("input", stage_name="user_query", attributes={"query": question})

        language = detect_language(question)
        query = rewrite(question, language)

        with tracer.stage("retrieval", stage_name="bm25") as stage:
            found = library.search(query, TOP_K)
            stage.attributes = {
                "query": query,
                "doc_ids": [passage.id for passage, _ in found],
                "scores": [score for _, score in found],
                "top_k": TOP_K,
            }
            if known := library.ids.intersection(relevant):  # which there are depends on Python's version
                stage.metadata["relevant_doc_ids"] = sorted(known)

        kept = []
        if found:
            with tracer.stage("rerank", stage_name="word_coverage") as stage:
                kept = rerank(query, found)
                stage.set(input_count=len(found), output_count=len(kept), scores=[score for _, score in kept])

        text = compose(question, query, [passage for passage, _ in kept])
        cited = "[" in text
        tracer.record_stage("answer_validation", attributes={"passed": cited, "rule": "has a citation"})
        request.set(passages_used=len(kept), answer_characters=len(text))
        return text


# ---------------------------------------------------------------- the questions

#: A question, and where it is known, what should be found.
QUESTIONS: list[tuple[str, tuple[str, ...]]] = [
    ("How do I parse a JSON string into a Python object?", ("json.loads",)),
    ("How do I write an object to a file as JSON?", ("json.dump",)),
    ("How do I copy a directory tree recursively?", ("shutil.copytree",)),
    ("How do I delete a directory tree?", ("shutil.rmtree",)),
    (
        "How do I make a temporary file?",
        ("tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "tempfile.mkstemp"),
    ),
    ("How do I make a temporary directory?", ("tempfile.TemporaryDirectory", "tempfile.mkdtemp")),
    ("How do I find the median of numbers?", ("statistics.median",)),
    ("How do I compute the standard deviation of a sample?", ("statistics.stdev",)),
    ("How do I escape HTML special characters?", ("html.escape",)),
    ("How do I wrap a paragraph of text to a width?", ("textwrap.wrap", "textwrap.fill")),
    ("How do I remove common leading whitespace from text?", ("textwrap.dedent",)),
    ("How do I split a shell command into arguments?", ("shlex.split",)),
    ("How do I quote a string for the shell?", ("shlex.quote",)),
    ("How do I run a command and capture its output?", ("subprocess.run", "subprocess.check_output")),
    ("How do I cache the results of a function?", ("functools.lru_cache", "functools.cache")),
    ("How do I count hashable objects?", ("collections.Counter",)),
    ("How do I merge several dictionaries into one view?", ("collections.ChainMap",)),
    ("How do I generate a random UUID?", ("uuid.uuid4",)),
    ("How do I generate a secure random token in hexadecimal?", ("secrets.token_hex",)),
    ("How do I choose a random element from a sequence?", ("random.Random.choice", "secrets.choice")),
    ("How do I shuffle a list in place?", ("random.Random.shuffle",)),
    ("How do I match file names against a shell pattern?", ("fnmatch.fnmatch", "fnmatch.filter")),
    ("How do I list files that match a glob pattern?", ("glob.glob", "glob.iglob")),
    ("How do I compile a regular expression?", ("re.compile",)),
    ("How do I substitute matches of a regular expression?", ("re.sub",)),
    ("How do I parse command line arguments?", ("argparse.ArgumentParser",)),
    ("How do I read a configuration file with sections?", ("configparser",)),
    ("How do I read rows of a CSV file as dictionaries?", ("csv.DictReader",)),
    ("How do I guess the dialect of a CSV file?", ("csv.Sniffer.sniff", "csv.Sniffer")),
    ("How do I compress data with gzip?", ("gzip.compress",)),
    ("How do I open a gzip compressed file?", ("gzip.open",)),
    ("How do I extract all members of a zip archive?", ("zipfile.ZipFile.extractall",)),
    ("How do I open a tar archive?", ("tarfile.open", "tarfile.TarFile.open")),
    ("How do I send an email message over SMTP?", ("smtplib.SMTP.send_message", "smtplib.SMTP.sendmail")),
    ("How do I fetch a URL?", ("urllib.request.urlopen",)),
    ("How do I parse a URL into components?", ("urllib.parse.urlparse", "urllib.parse.urlsplit")),
    ("How do I encode a dictionary as a URL query string?", ("urllib.parse.urlencode",)),
    ("How do I start a simple HTTP server?", ("http.server", "http.server.HTTPServer")),
    ("How do I run a coroutine to completion?", ("asyncio.runners.run",)),
    ("How do I wait for several asyncio tasks together?", ("asyncio.tasks.gather", "asyncio.tasks.wait")),
    ("How do I wait with a timeout in asyncio?", ("asyncio.tasks.wait_for", "asyncio.timeouts.timeout")),
    ("How do I limit concurrency with a semaphore?", ("asyncio.locks.Semaphore", "threading.Semaphore")),
    ("How do I create a thread?", ("threading.Thread",)),
    ("How do I run something after a delay in a thread?", ("threading.Timer",)),
    ("How do I share a queue between threads?", ("queue.Queue",)),
    ("How do I use a pool of worker processes?", ("multiprocessing.pool.Pool",)),
    ("How do I map a function over inputs with an executor?", ("concurrent.futures._base.Executor.map",)),
    ("How do I pretty print nested data?", ("pprint.pprint", "pprint.pformat")),
    ("How do I compare two sequences of lines as a diff?", ("difflib.unified_diff", "difflib.ndiff")),
    ("How do I find close matches of a word?", ("difflib.get_close_matches",)),
    ("How do I deep copy an object?", ("copy.deepcopy",)),
    ("How do I log a message with traceback?", ("logging.exception", "logging.Logger.exception")),
    ("How do I rotate log files by size?", ("logging.handlers.RotatingFileHandler",)),
    ("How do I print the traceback of an exception?", ("traceback.print_exc", "traceback.print_exception")),
    ("How do I write a unit test case?", ("unittest.case.TestCase",)),
    ("How do I patch an object in a test?", ("unittest.mock.patch",)),
    ("How do I measure the time of a small code snippet?", ("timeit.timeit", "timeit")),
    ("How do I profile a Python program?", ("cProfile.run", "profile.run")),
    ("How do I trace memory allocations?", ("tracemalloc.start", "tracemalloc.Snapshot")),
    ("How do I get the signature of a callable?", ("inspect.signature", "inspect.Signature")),
    ("How do I get the source code of a function?", ("inspect.getsource",)),
    ("How do I import a module by name?", ("importlib.import_module",)),
    ("How do I read a file that belongs to a package?", ("importlib.resources",)),
    ("How do I make a context manager from a generator?", ("contextlib.contextmanager",)),
    ("How do I suppress exceptions in a with block?", ("contextlib.suppress",)),
    ("How do I redirect stdout to a file?", ("contextlib.redirect_stdout",)),
    ("How do I make a data class?", ("dataclasses.dataclass",)),
    ("How do I turn a dataclass into a dict?", ("dataclasses.asdict",)),
    ("How do I define an enumeration?", ("enum.Enum",)),
    ("How do I represent a fraction exactly?", ("fractions.Fraction",)),
    ("How do I push an item on a heap?", ("heapq",)),
    ("How do I find the insertion point in a sorted list?", ("bisect.bisect_left", "bisect.bisect_right")),
    (
        "How do I print a calendar month?",
        ("calendar.TextCalendar.prmonth", "calendar.TextCalendar.formatmonth"),
    ),
    ("How do I read lines of several files as one stream?", ("fileinput.input", "fileinput")),
    ("How do I open a web page in the browser?", ("webbrowser.open",)),
    ("How do I ask for a password without echo?", ("getpass.unix_getpass",)),
    ("How do I look up translations of messages?", ("gettext.translation", "gettext.install")),
    ("How do I format numbers for a locale?", ("locale.format_string", "locale.currency")),
    ("How do I connect to an IMAP mail server?", ("imaplib.IMAP4",)),
    ("How do I check whether an IP address is private?", ("ipaddress.IPv4Address.is_private",)),
    (
        "How do I parse an XML document into a tree?",
        ("xml.etree.ElementTree.parse", "xml.etree.ElementTree.XML"),
    ),
    ("How do I store objects persistently in a dictionary?", ("shelve.open", "shelve")),
    ("How do I disassemble bytecode?", ("dis.dis",)),
    ("How do I evaluate a literal expression safely?", ("ast.literal_eval",)),
    ("JSON 문자열을 파싱하는 방법은?", ("json.loads",)),
    ("임시 파일은 어떻게 만드나요?", ("tempfile.NamedTemporaryFile", "tempfile.TemporaryFile")),
    ("디렉터리를 통째로 복사하려면?", ("shutil.copytree",)),
    ("gzip으로 데이터를 압축하려면 어떻게 하나요?", ("gzip.compress",)),
    ("숫자의 중앙값을 구하는 함수는?", ("statistics.median",)),
    ("숫자의 평균을 구하려면?", ("statistics.mean",)),
    (
        "안전한 난수 토큰을 만드는 방법은?",
        ("secrets.token_hex", "secrets.token_bytes", "secrets.token_urlsafe"),
    ),
    ("정규식 패턴으로 검색하려면?", ("re.search",)),
    ("함수 결과를 캐시하는 방법은?", ("functools.lru_cache", "functools.cache")),
    ("여러 비동기 작업을 함께 기다리려면? asyncio gather", ("asyncio.tasks.gather",)),
    ("스레드 사이에서 큐를 공유하려면?", ("queue.Queue",)),
    ("프로세스 풀을 사용하는 방법은? pool", ("multiprocessing.pool.Pool",)),
    ("로그 파일을 크기별로 나누려면? rotating", ("logging.handlers.RotatingFileHandler",)),
    ("명령줄 인자를 파싱하려면? argparse", ("argparse.ArgumentParser",)),
    ("객체를 깊은 복제하려면?", ("copy.deepcopy",)),
    ("조합과 순열을 구하는 방법은? itertools", ()),
    ("예외의 추적 정보를 출력하려면? print", ("traceback.print_exc", "traceback.print_exception")),
    ("이메일 메시지를 만드는 방법은? message", ("email.message.EmailMessage",)),
    ("달력을 출력하려면? month", ("calendar.TextCalendar.prmonth",)),
    ("설정 파일을 읽으려면? section", ("configparser",)),
    # Nothing is found for these: none of their words is in the library.
    ("blorptastic zzyzxquux frobnitzel?", ()),
    ("보험 보장금액은 얼마인가요?", ()),
    ("qwertyzuiop asdfghjklish?", ()),
    # These are refused: the stage that detects the language raises.
    ("ファイルを読む方法は？", ()),
    ("Как прочитать файл построчно?", ()),
    ("🤖🤖🤖 1234 !!!", ()),
]


def main(on_answer: Callable[[str, str], None] = lambda question, text: None) -> Stats:
    """Answer all questions, deliver what was recorded, and return what became of it."""
    library = Library()
    for question, relevant in QUESTIONS:
        try:
            text = answer(library, question, relevant)
        except UnsupportedLanguageError as error:
            text = f"(refused: {error})"
        except requests.RequestException as error:
            text = f"(the model failed: {type(error).__name__})"
        on_answer(question, text)
    return tracer.shutdown(timeout=30)


if __name__ == "__main__":
    stats = main(lambda question, text: print(f"Q: {question}\nA: {text[:160]}\n"))
    print(stats)
    sys.exit(0 if stats.complete else 1)
