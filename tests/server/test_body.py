"""What comes over the wire: packed, cut, lying, odd; asked of a server in a process of its own."""

from __future__ import annotations

import gzip
import json
import struct
import uuid
from typing import Any
from urllib.parse import quote

import pytest
import requests
import zstandard

from tests.server.wire import connect, exchange, memory_mib, request, status_of
from tests.support import LiveServer

NDJSON = "application/x-ndjson"
#: The magic number of a zstd frame, and a header that wants a window of 2 MiB and says no content size.
_ZSTD_HEADER = struct.pack("<I", 0xFD2FB528) + b"\x00\x58"


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


def line(run: str, number: int) -> bytes:
    return json.dumps({"run_id": run, "stage_type": "x", "stage_id": f"s{number}"}).encode()


def post(server: LiveServer, body: bytes, encoding: str = "identity", kind: str = "application/json") -> Any:
    return server.post(body, headers={"Content-Encoding": encoding, "Content-Type": kind})


def test_zstd_is_understood_in_frames_and_beside_frames_that_are_skipped(server: LiveServer, run: str) -> None:
    packer, body = zstandard.ZstdCompressor(), line(run, 1)
    skippable = struct.pack("<II", 0x184D2A50, 100) + b"x" * 100
    for packed in (
        packer.compress(body),
        packer.compress(body[:10]) + packer.compress(body[10:]),
        skippable + packer.compress(body),
    ):
        assert post(server, packed, "zstd").json()["stored"] == 1


def test_zstd_that_is_none_is_a_clear_error(server: LiveServer, run: str) -> None:
    packed = zstandard.ZstdCompressor().compress(line(run, 1))
    empty_blocks = _ZSTD_HEADER + b"\0\0\0" * 100_000
    with_dictionary = struct.pack("<I", 0xFD2FB528) + b"\x23\x01\x02\x03\x04" + bytes(10)
    for body in (b"", packed[:-3], packed + b"garbage", b"none", empty_blocks, with_dictionary):
        answer = post(server, body, "zstd")
        assert answer.status_code == 400
        assert "zstd" in answer.json()["error"]


@pytest.mark.parametrize("frames", [zstandard.ZstdCompressor().compress(b""), struct.pack("<II", 0x184D2A50, 0)])
def test_frames_without_end_that_hold_nothing_are_refused(server: LiveServer, frames: bytes) -> None:
    answer = post(server, frames * 100_000, "zstd")
    assert (answer.status_code, answer.json()["details"]) == (400, "the body has more than 16 zstd frames")


def test_a_zstd_bomb_is_not_unpacked(server: LiveServer) -> None:
    before = memory_mib(server)
    block = struct.pack("<I", (131_072 << 3) | (1 << 1))[:3] + b" "  # 128 KiB in four bytes: the densest there is
    bombs = [zstandard.ZstdCompressor().compress(bytes(1 << 28)), _ZSTD_HEADER + block * 500_000]
    for bomb in bombs:
        answer = post(server, bomb, "zstd")
        assert (answer.status_code, answer.json()["limit_bytes"]) == (413, 32 << 20)
    assert memory_mib(server) < before + 200


def test_a_zstd_frame_may_not_ask_for_a_large_window(server: LiveServer) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=26)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    answer = post(server, packer.compress(b'{"a": 1}') + packer.flush(), "zstd")
    assert (answer.status_code, answer.json()["error"]) == (400, "Malformed zstd")


def test_packed_twice_is_unpacked_once(server: LiveServer, run: str) -> None:
    twice = gzip.compress(gzip.compress(line(run, 1)))
    assert post(server, twice, "gzip").json()["error"] == "Malformed JSON"
    assert post(server, twice, "gzip, gzip").status_code == 415
    assert post(server, gzip.compress(line(run, 1)), "GZIP").status_code == 200


def test_a_body_that_is_not_as_long_as_it_says_stores_nothing(server: LiveServer, run: str) -> None:
    body = line(run, 1)
    with connect(server) as connection:
        connection.sendall(request(body, Content_Length=str(len(body) + 100)))
    assert status_of(exchange(server, request(body, Content_Length="5"))) == 400
    assert requests.get(f"{server.url}/api/stage/events/{run}", timeout=10).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": "-5"},
        {"Content_Length": "9" * 30},
        {"Content_Length": "4", "Transfer_Encoding": "chunked"},
        {"Content_Length": "4\r\nContent-Length: 5"},
    ],
)
def test_a_length_that_two_servers_could_read_in_two_ways_is_refused(
    server: LiveServer, headers: dict[str, str]
) -> None:
    assert status_of(exchange(server, request(b"0\r\n\r\n", **headers))) == 400


def test_a_body_in_chunks_of_a_byte_is_a_body(server: LiveServer, run: str) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in line(run, 1)) + b"0\r\n\r\n"
    sent = request(chunks, Content_Length="", Transfer_Encoding="chunked", Connection="close")
    assert status_of(exchange(server, sent)) == 200


def test_requests_that_come_all_at_once_are_answered_in_their_order(server: LiveServer, run: str) -> None:
    sent = [request(line(run, number)) for number in range(49)] + [request(line(run, 49), Connection="close")]
    answers = exchange(server, b"".join(sent))
    places = [answers.index(f'"s{number}"'.encode()) for number in range(50)]
    assert answers.count(b"HTTP/1.1 200") == 50
    assert places == sorted(places)


def test_lines_may_end_as_on_any_system_and_begin_with_a_byte_order_mark(server: LiveServer, run: str) -> None:
    bodies = {
        b"\xef\xbb\xbf" + line(run, 1) + b"\n": 1,
        b"\r\n".join([line(run, 1), b"", line(run, 2), b"   "]) + b"\r\n": 2,
        line(run, 1) + b"\r" + line(run, 2): 2,
        line(run, 1).replace(b'"x"', '"x", "stage_name": "a\u2028b\u0085c"'.encode()): 1,
    }
    for body, stored in bodies.items():
        assert post(server, body, kind=NDJSON).json()["stored"] == stored


def test_a_line_that_is_no_json_is_named_and_its_neighbours_are_stored(server: LiveServer, run: str) -> None:
    answer = post(server, b"\n".join([line(run, 0), b"{oops", b"[1]", b"\0", line(run, 4)]), kind=NDJSON)
    assert (answer.status_code, answer.json()["stage_ids"]) == (207, ["s0", "s4"])
    reasons = [(entry["index"], entry["error"]) for entry in answer.json()["rejected"]]
    assert reasons == [(1, "Malformed JSON"), (2, "Invalid stage event"), (3, "Malformed JSON")]


def test_ten_thousand_lines_are_taken_and_not_one_more(server: LiveServer, run: str) -> None:
    lines = [line(run, number) for number in range(10_001)]
    answer = post(server, b"\n".join(lines), kind=NDJSON)
    assert (answer.status_code, answer.json()["limit_events"]) == (413, 10_000)
    assert post(server, b"\n\n".join(lines[1:]), kind=NDJSON).json()["stored"] == 10_000


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (b'"attributes": {"a": 1e999}', 422, "attributes.a must be a finite number"),
        (b'"attributes": {"a": -1e999}', 422, "attributes.a must be a finite number"),
        (b'"duration_ms": ' + b"9" * 400, 422, "duration_ms must be a finite number"),
        (b'"attributes": {"a": ' + b"9" * 1_000_000 + b"}", 422, "attributes.a must be a finite number"),
        (b'"attributes": {"a": 0.' + b"9" * 1_000_000 + b"}", 200, ""),
        (b'"attributes": {"a": 1e-99999999}', 200, ""),
        (b'"attempt": true', 422, "attempt must be an integer"),
        (b'"attempt": 2147483648', 422, "attempt must be at least 1 and below"),
        (b'"stage_type": "y", "stage_type": "z"', 200, ""),
        (b'"run_id": 7', 422, "run_id must be a string"),
        (b'"stage_name": "a\\u0000b"', 422, "stage_name must not hold a NUL character"),
        (b'"attributes": {"a": "a\\u0000b", "b\\u0000": 1}', 200, ""),
        (b'"stage_id": "' + b"a" * 257 + b'"', 422, "stage_id must have at most 256 characters"),
        (b'"stage_type": "' + b"a" * 129 + b'"', 422, "stage_type must have at most 128 characters"),
    ],
)
def test_odd_values_are_judged_and_never_a_fault(
    server: LiveServer, run: str, change: bytes, status: int, words: str
) -> None:
    answer = post(server, line(run, 1)[:-1] + b", " + change + b"}")
    assert answer.status_code == status
    assert words in answer.json().get("details", "")


@pytest.mark.parametrize(
    "run_id",
    ["A" * 300, "a//b", "/a", "a/", "..", "a/../b", "a/./b", "a\tb", "a\nb", "a\0b", "a\u202eb", "a\u200bb", "", " "],
)
def test_a_run_id_that_no_address_could_hold_is_refused(server: LiveServer, run_id: str) -> None:
    answer = server.post({"run_id": run_id, "stage_type": "x"})
    assert answer.status_code == 422
    assert answer.json()["details"].startswith("run_id ")


@pytest.mark.parametrize("name", ["%2e%2e", "😀", "a?b#c", "a;b=c&d", ".hidden", "e\u0301", "\u00e9", "%00", "+"])
def test_every_endpoint_finds_a_run_by_the_id_under_which_it_was_stored(server: LiveServer, name: str) -> None:
    run = f"{name}{uuid.uuid4()}"
    assert server.post({"run_id": run, "stage_type": "x", "trace_id": "t"}).status_code == 200
    address = quote(run, safe="")
    for what in ("events", "traces", "metrics", "summary", "debug", "export"):
        assert requests.get(f"{server.url}/api/stage/{what}/{address}", timeout=10).status_code == 200
    assert requests.post(f"{server.url}/api/stage/metrics/{address}", timeout=10).status_code == 200
    assert requests.delete(f"{server.url}/api/stage/runs/{address}", timeout=10).json()["deleted"] == 1


@pytest.mark.parametrize(
    "path",
    ["a%00b", "%ff%fe", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "../../etc/passwd", "", "a" * 60_000, "%0d%0aX-Evil:%201"],
)
def test_a_run_that_cannot_be_is_not_found(server: LiveServer, path: str) -> None:
    for what in ("events", "export"):
        sent = request(path=f"/api/stage/{what}/{path}", method="GET", Connection="close")
        answer = exchange(server, sent)
        assert status_of(answer) == 404
        assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{oops\n{oops", 400, "invalid_payload"),
        (b"{}\n", 422, "invalid_payload"),
        (b"", 422, "invalid_payload"),
        (b"{}\n" * 10_001, 413, "too_large"),
    ],
)
def test_the_drafted_path_says_no_in_the_drafts_form(server: LiveServer, body: bytes, status: int, code: str) -> None:
    answer = requests.post(
        f"{server.url}/api/v1/ingest/stage-events",
        data=body,
        headers={"Content-Type": "application/jsonl"},
        timeout=10,
    )
    assert answer.status_code == status
    assert (answer.json()["status"], answer.json()["error_code"]) == ("error", code)
