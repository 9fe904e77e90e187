from __future__ import annotations

import io
import subprocess
import sys

import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.capture.console import Console
from evalvault_sdk.capture.given import Given
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.testing import CapturingTransport
from tests.support import ListSink, clean_environment


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_stage_is_a_line_below_those_inside_it_and_content_is_short() -> None:
    stream, sink = io.StringIO(), ListSink()
    recorder = Recorder("run", Console(sink, stream))
    with StageContext(recorder, "request"):
        with StageContext(recorder, "retrieval", Given(stage_name="bm25")) as stage:
            stage.set(
                doc_ids=["d1", "d2"],
                top_k=5,
                waited_ms=10.110759,
                query="긴 질문 " * 50,
                nested={"a": 1},
                line="a\nb\x1b[31m",
            )
        with pytest.raises(ValueError, match="empty"), StageContext(recorder, "output"):
            raise ValueError("empty")
    first, second, third = printed(stream)
    assert "  retrieval (bm25) " in first
    assert " ms  success   doc_ids=[2] top_k=5 waited_ms=10.11 query=긴 질문 긴 질문" in first
    assert len(first) <= 160
    assert "\x1b" not in stream.getvalue()
    assert "  output " in second
    assert "error     error=ValueError: empty" in second
    assert third[8:].lstrip().startswith("request")
    assert len(sink.put_events) == 3


def test_a_terminal_gets_colours_unless_it_does_not_want_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = Terminal()
    with StageContext(Recorder("run", Console(ListSink(), coloured)), "success"):
        pass
    (line,) = printed(coloured)
    assert line[9:].startswith("success ")
    assert line.endswith("\x1b[32msuccess\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    with StageContext(Recorder("run", Console(ListSink(), plain)), "a"):
        pass
    assert "\x1b" not in plain.getvalue()


def test_what_is_redacted_is_not_printed_either(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "sk-" + "a1B2" * 8
    tracer = StageTracer("run", transport=CapturingTransport(), console=True, personal_data="email")
    tracer.record_stage("input", attributes={"query": f"{secret} of kim@example.com", "password": "hunter22"})
    tracer.shutdown()
    line = capsys.readouterr().err
    assert "query=[secret] of [email] password=[secret]" in line


@pytest.mark.parametrize("closing", ["sys.stderr.close()", "sys.stderr = None"])
def test_a_stream_that_is_gone_is_not_felt(closing: str) -> None:
    script = f"""
import sys
from evalvault_sdk import StageTracer
from evalvault_sdk.testing import CapturingTransport
transport = CapturingTransport()
tracer = StageTracer("run", transport=transport, console=True)
{closing}
with tracer.stage("a"):
    pass
tracer.shutdown()
print(len(transport.events))
"""
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True)
    assert done.stdout == "1\n"
