# ruff: noqa: E501, SIM905, RUF005 - tables of examples
from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evalvault_sdk.capture.redact import SECRET, Redactor
from evalvault_sdk.config import PersonalData

KINDS: tuple[PersonalData, ...] = ("email", "phone", "card", "resident_number", "passport", "account")

# Put together at run time, so that whoever searches the repository for secrets finds none.
BODY = "a1B2" * 9
SK = "sk" + "-" + BODY
JWT = ".".join(["ey" + "J" + BODY, "ey" + "J" + BODY, BODY])
DASHES = "-" * 5
PEM = "\n".join(
    [f"{DASHES}BEGIN RSA PRIVATE KEY{DASHES}", "MIIB" + BODY, BODY + "==", f"{DASHES}END RSA PRIVATE KEY{DASHES}"]
)
BASIC = base64.b64encode(b"user:hunter22").decode()


def redacted(text: str, *kinds: PersonalData) -> str:
    return Redactor(secrets=not kinds, personal=kinds).text(text)


# --- Keys ---


@pytest.mark.parametrize(
    "key",
    """authorization Authorization proxy-authorization http.request.header.authorization api_key apikey apiKey APIKey
    x-api-key X-Api-Key OPENAI_API_KEY openaiApiKey api_key_2 password PASSWORD passwd pwd passphrase dbPassword
    db_password password_hash secret client_secret clientSecret token access_token accessToken refresh_token id_token
    idToken auth_token authtoken bearer session_token csrf_token csrfToken hf_token private_key privateKey credential
    credentials cookie cookies set-cookie Set-Cookie aws_secret_access_key secretAccessKey connection_string
    connectionString dsn SENTRY_DSN serviceKey token_value 비밀번호 user.password""".split(),
)
def test_a_key_that_holds_a_secret_is_known(key: str) -> None:
    assert Redactor().is_secret(key)


@pytest.mark.parametrize(
    "key",
    """tokens tokens_in tokens_out max_tokens maxTokens token_count tokenCount total_tokens prompt_tokens num_tokens
    token_ratio tokenizer time_to_first_token timeToFirstToken token_ids secretary keyword keywords key keys doc_key
    primary_key author authors authorized cache_key session_id password_policy_id next_page_token page_token
    cost_per_token eos_token query doc_ids scores top_k monkey keyboard cookie_policy public_key sort_key""".split()
    + [""],
)
def test_an_everyday_word_is_no_secret_key(key: str) -> None:
    assert not Redactor().is_secret(key)


def test_a_key_with_blanks_is_known_as_well() -> None:
    assert Redactor().is_secret("CSRF token")
    assert Redactor().is_secret("API Key")


def test_no_key_is_secret_when_secrets_are_off() -> None:
    assert not Redactor(secrets=False).is_secret("password")


def test_verdicts_are_remembered_in_bounded_memory() -> None:
    redactor = Redactor()
    for number in range(10_000):
        redactor.is_secret(f"key {number}")
        redactor.is_secret(f"{number}" * 1000 + "_password")
    assert len(redactor.verdicts) <= 4096
    assert max(map(len, redactor.verdicts)) < 200
    assert redactor.is_secret("password")
    assert redactor.verdicts["password"] is True


def test_a_key_without_end_is_judged_by_its_end() -> None:
    assert Redactor().is_secret("x" * 1_000_000 + "_password")
    assert not Redactor().is_secret("password_" + "x" * 1_000_000)


# --- Secrets in texts ---

WHOLE_SECRETS = [
    SK,
    "sk" + "-proj-" + "Ab-_" * 12,
    "sk" + "-ant-api03-" + BODY,
    "sk" + "-svcacct-" + BODY,
    "sk" + "-or-v1-" + "0a1b" * 16,
    "sk" + "-" + "x" * 48,
    "AK" + "IA" + "ABCD1234" * 2,
    "AS" + "IA" + "ABCD1234" * 2,
    *(f"gh{kind}_" + BODY for kind in "pousr"),
    "github" + "_pat_" + BODY + "_" + BODY,
    "gl" + "pat-" + "a1B2-" * 4,
    "xo" + "xb-123456789012-" + BODY,
    "xo" + "xp-1-" + BODY,
    "AI" + "za" + "a1B2_-x" * 5,
    "h" + "f_" + BODY,
    JWT,
    PEM,
    PEM.replace("\n", "\\n"),
    PEM.replace("RSA ", ""),
    PEM.replace("RSA ", "OPENSSH "),
    "lsv2" + "_pt_" + "0a1b" * 8 + "_" + "0a1b2c3d4e",
    "lsv2" + "_sk_" + "0a1b" * 8,
    "sk" + "-lf-" + "12345678-1234-4abc-8abc-123456789abc",
    "pk" + "-lf-" + "12345678-1234-4abc-8abc-123456789abc",
    "sk" + "_live_" + BODY,
    "rk" + "_live_" + BODY,
    "sk" + "_test_" + BODY,
    "gs" + "k_" + BODY,
    "pc" + "sk_" + BODY + "_" + BODY,
    "np" + "m_" + BODY,
    "py" + "pi-AgEI" + BODY,
]


@pytest.mark.parametrize("secret", WHOLE_SECRETS)
@pytest.mark.parametrize("around", ["{}", "열쇠는{}입니다", "a {} b", '{{"k": "{}"}}', "\n{}\n", "({})", "x={}"])
def test_a_secret_is_replaced_and_nothing_else(secret: str, around: str) -> None:
    assert redacted(around.format(secret)) == around.format(SECRET)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer xyz", "Authorization: Bearer [secret]"),
        (f"Authorization: Bearer {JWT}", "Authorization: Bearer [secret]"),
        ("got Bearer abcdefgh12345678 there", "got Bearer [secret] there"),
        (f"Authorization: Basic {BASIC}", "Authorization: Basic [secret]"),
        (f"with Basic {BASIC}", "with Basic [secret]"),
        ("curl -H 'x-api-key: hunter22hunter22'", "curl -H 'x-api-key: [secret]'"),
        ("https://user:pass@host/path", "https://[secret]@host/path"),
        ("redis://:pass@localhost:6379/0", "redis://[secret]@localhost:6379/0"),
        ("postgresql://u:p@ss@db/x", "postgresql://[secret]@db/x"),
        ("api_key=hunter22&x=1", "api_key=[secret]&x=1"),
        ("api_key = 'abc'", "api_key = '[secret]'"),
        ("password: hunter22", "password: [secret]"),
        ("note: password: hunter22", "note: password: [secret]"),
        ("password:hunter22", "password:[secret]"),
        ("AWS_SECRET_ACCESS_KEY=abcd/efgh+1234", "AWS_SECRET_ACCESS_KEY=[secret]"),
        ("API Key: abcdefgh1234", "API Key: [secret]"),
        ("--password=hunter22", "--password=[secret]"),
        ('{"password": "abc", "x": 1}', '{"password": "[secret]", "x": 1}'),
        ('{\\"client_secret\\":\\"abc\\"}', '{\\"client_secret\\":\\"[secret]\\"}'),
        ("{'apiKey': 'abc'}", "{'apiKey': '[secret]'}"),
        ("비밀번호: abcd1234입니다", "비밀번호: [secret]입니다"),
        ("비밀번호:abcd1234", "비밀번호:[secret]"),
        ("Cookie: a=b; c=d", "Cookie: [secret]"),
        ("Server=db;Password=hunter22;X=1", "Server=db;Password=[secret];X=1"),
        (f"{DASHES}BEGIN PRIVATE KEY{DASHES}\n{BODY}", "[secret]"),  # the text was cut
    ],
)
def test_of_a_secret_with_a_label_the_label_stays(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected, "a second time changes nothing"


INNOCENT = [
    "task-force-management-of-risk",
    "risk-adjusted-returns-2026-overview-long",
    "sk-learn",
    "see sk-learn-1-2-api-reference-guide-for-beginners",
    "desk-a1b2c3d4e5f6a1b2c3d4e5f6a1b2c3d4",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "12345678-1234-4abc-8abc-123456789abc",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "policy-2026-0001",
    base64.b64encode("보험 약관의 내용".encode() * 9).decode(),
    "the password policy is: at least eight",
    "the password policy is strict",
    "password: required",
    "비밀번호: 영문숫자조합으로설정하세요",
    "Bearer of bad news",
    "Basic JavaScript and Basic authentication",
    "hf_transformers_integration_tests_folder",
    "npm_config_registry_and_other_long_names",
    "tokens: 12345678, max_tokens=12345678",
    "token_count: 12345678, next_page_token=abcdefgh12",
    "keyword: hunter22, monkey=hunter22, key: hunter22, primary_key=hunter22",
    "http://localhost:8080/a@b",
    "https://example.com:443?mail=a@b.com",
    "질문: 이 보험의 보장금액은? 답변: 1억원입니다.",
    "AKIAZ, eyJ, ghp_, xoxo-xoxo",
]


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_a_secret_stays_the_same_object(text: str) -> None:
    assert Redactor().text(text) is text


def test_nothing_is_redacted_unless_asked_for() -> None:
    off = Redactor(secrets=False)
    text = f"{SK} kim@example.com 010-1234-5678"
    assert (off.active, off.personal, off.text(text)) == (False, False, text)
    assert not off.may_hold_secret(orjson.dumps(SK))
    assert Redactor().text("kim@example.com 010-1234-5678") == "kim@example.com 010-1234-5678"
    assert (Redactor().active, Redactor().personal) == (True, False)
    assert Redactor(secrets=False, personal=["email"]).personal


# --- The quick look ---


@pytest.mark.parametrize("text", INNOCENT[:4] + INNOCENT[5:8] + INNOCENT[9:12] + INNOCENT[14:15])
def test_the_quick_look_is_not_alarmed_by_ordinary_texts(text: str) -> None:
    event = {"run_id": "rag-001", "attributes": {"query": text, "tokens_in": 912, "top_k": 5, "doc_key": "a"}}
    assert not Redactor().may_hold_secret(orjson.dumps(event))


LABELLED = [
    "password: hunter22", "API_KEY=hunter22", 'pwd" : "x"', '{"Secret":"x"}', "Authorization: Bearer xyz", "cookie: a=b",
    "비밀번호:abcd1234", "비번=abcd1234", "패스워드 : abcd1234", "https://u:p@h", "https://\u3042:가@h", f"Basic {BASIC}",
    "Bearer abcdefgh12345678", '\\"token\\":\\"x\\"', "Connection String: 'x'", "dsn='x'", "CREDENTIALS: 'x'",
    "pa\u017f\u017fword=hunter22", "to\u212aen=hunter22", "pass\u200bword: hunter22", 'passphrase\\\\\\": \\"x',
]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(WHOLE_SECRETS + LABELLED),
    st.sampled_from(
        list("\n\t\r\b\x00\x1f\x7f\"\\'/-_.:=@ \u00e9\u00a0\U0001f600가 aZ9") + ["\\n", "://", "key", "sk"]
    ),
    st.text(max_size=4),
)


@pytest.mark.parametrize("before", ["", "\n", "\x01", "가", "x = "])
@pytest.mark.parametrize("secret", WHOLE_SECRETS + LABELLED[:-4])
def test_the_quick_look_knows_every_kind_of_secret(secret: str, before: str) -> None:
    assert redacted(before + secret) != before + secret
    assert Redactor().may_hold_secret(orjson.dumps({"attributes": {"a": [before + secret], "b": 1}}))


@pytest.mark.parametrize("secret", WHOLE_SECRETS + LABELLED)
def test_a_secret_in_a_long_text_is_replaced_as_in_a_short_one(secret: str) -> None:
    before, after = "보통의 말이 이어집니다, and so on. " * 40, "그리고 끝납니다. " * 40
    assert redacted(f"{before}\n{secret}\n{after}") == f"{before}{redacted(f'{chr(10)}{secret}{chr(10)}')}{after}"


def test_a_long_text_without_a_secret_costs_little_more_than_its_encoding() -> None:
    text = "The amount is paid when the holder asks for it: see clause 12 of the terms. " * 1_500
    redactor = Redactor()

    def seconds(function: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            started = time.thread_time()
            function()
            taken.append(time.thread_time() - started)
        return min(taken)

    thorough = seconds(lambda: redactor._without_assigned(text))
    assert seconds(lambda: redactor.text(text)) < thorough
    assert redactor.text(text) is text


@given(st.lists(PIECES, max_size=6))
@example(["\n", SK])
@example(["\x01", WHOLE_SECRETS[10]])
@example(["https://", "\x01", ":", "p@h"])
def test_the_quick_look_never_misses_what_would_be_replaced(pieces: list[str]) -> None:
    text = "".join(pieces)
    redactor = Redactor()
    encodable = text.encode("utf-8", "replace").decode()
    if redactor.text(encodable) != encodable:
        assert redactor.may_hold_secret(orjson.dumps({"run_id": "r", "attributes": {"a": [encodable], "b": 1}}))


# --- Personal data ---


def resident(front: str, kind: int, rest: str = "00000") -> str:
    """A registration number with the right check digit, of nobody."""
    digits = f"{front}{kind}{rest}"
    total = sum(int(d) * w for d, w in zip(digits, [2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5], strict=True))
    check = (11 - total % 11) % 10
    return f"{front}-{kind}{rest}{(check + 2) % 10 if 5 <= kind <= 8 else check}"


def wrong(number: str) -> str:
    return number[:-1] + str((int(number[-1]) + 1) % 10)


MATCHING: dict[PersonalData, list[str]] = {
    "email": """kim@a.com kim.lee+x@mail.example.co.kr a@b.io KIM@EXAMPLE.COM k_1@x-y.org 1@2.kr a%b@c.de x@sub.a.museum""".split(),
    "phone": [
        "010-1234-5678", "01012345678", "010 1234 5678", "010.1234.5678", "011-123-4567", "02-123-4567", "0212345678",
        "(031) 123-4567", "070-1234-5678", "0505-123-4567", "0505-1234-5678", "+82 10-1234-5678", "+821012345678",
        "+82-2-123-4567", "1588-1234", "1644-0000", "415-555-2671", "(415) 555-2671", "+1 415 555 2671",
        "+1 (415) 555-2671", "+44 20 7946 0958", "1-415-555-2671",
    ],
    "card": [
        "4111111111111111", "4111-1111-1111-1111", "4111 1111 1111 1111", "5555555555554444", "378282246310005",
        "3782 822463 10005", "6011111111111117", "3530111333300000", "30569309025904", "2223003122003222",
        "4222222222222", "6200000000000005",
    ],
    "resident_number": [
        *(resident("000101", kind) for kind in range(10)), resident("991231", 1).replace("-", ""), resident("000229", 4),
        "201005-3000000", "2103014999999", "220101-7123456", "220101-8123456", resident("900101", 1).replace("-", " - "),
    ],
    "passport": [
        "M12345678", "S12345678", "R98765432", "G12345678", "D00000001", "M123A4567", "S987Z6543", "R000B0000",
        "M123456788KOR8001014M3001019<<<<<<<<<<<<<<04",
    ],
    "account": [
        "110-123-456789", "123456-01-123456", "1002-123-456789", "3333-01-1234567", "123-456789-01234", "1000-1234-5678",
        "301-1234-5678-01", "123-45-6789-012", "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32",
        "FR1420041010050500013M02606",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in MATCHING.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "{}로 보내", "번호는{}입니다", "a: {}, b", "({})", "{}.", "{},{}"])
def test_personal_data_is_replaced_whatever_stands_beside_it(kind: PersonalData, text: str, around: str) -> None:
    expected = around.format(f"[{kind}]", f"[{kind}]")
    assert redacted(around.format(text, text), kind) == expected
    assert redacted(around.format(text, text), *KINDS) == expected, "and it is taken for nothing else"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("계좌번호 11012345678901 입니다", "계좌번호 [account] 입니다"),
        ("계좌: 국민은행 12345678901234", "계좌: 국민은행 [account]"),
        ("계좌번호는 1101234567", "계좌번호는 [account]"),
        ("Account number: 1234567890", "Account number: [account]"),
        ("acct 1234567890", "acct [account]"),
        ("110123456789 계좌로", "[account] 계좌로"),
        ("계좌 01012345678", "계좌 [account]"),
        ("IBAN DE89 3704 0044 0532 0130 00 BANK", "IBAN [account] BANK"),
        ("4111 1111 1111 1111 123", "[card] 123"),
        ("(02)1234-5678, 02)1234-5678", "[phone], [phone]"),
        ("kim@a.com, 010-1234-5678", "[email], [phone]"),
    ],
)
def test_the_words_beside_personal_data_stay(text: str, expected: str) -> None:
    assert redacted(text, *KINDS) == expected


ORDINARY = [
    "2026-01-07", "2026-01-07T10:00:00+09:00", "2026-01-07 10:00:00.123456", "20260107", "20260107100000",
    "192.168.100.200", "10.0.0.1:8080", "1.2.3", "v2026.01.07", "12345678-1234-4123-8123-123456789012",
    "0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7", "policy-2026-0001", "policy-2026-0001-0002", "doc-1588-1234",
    "1,234,567원", "1234567890원", "0.8345678901234567", "0.4111111111111111", "123.4567890123", "4111111111111112", "4111-1111-1111-1112",
    "1234567890123456", "@decorator", "a@b", "pkg@1.2.3", "user@localhost", "1767780000000", "1767780000000000",
    "1767780000", "제10조제2항 및 제123조의4", "1592-1598", "1588-1600", "1600-2026", "123-45-67890", "2026-01-000001",
    "2026-0107-0001", "M20260107", "M1234567", "XM12345678", "M123456789", "m12345678", "A12345678", "MM23A4567",
    "M123A45678", "M-12345678", "DE89370400440532013001", "110-1234", "1101234567890", "account balance 1234567",
    wrong(resident("900101", 1)), wrong(resident("900101", 5)), wrong(resident("050101", 3)), wrong(resident("200930", 3)),
    "901301-1234567", "900230-1234567", "901131-1234567", "991231-3123456", "9001011-234567",
    "M123456785KOR8001014M3001019<<<<<<<<<<<<<<04", "a" * 70 + "@", "+1,234,567", "UTC+09:00", "+2026-01-07",
    "115-555-2671", "415-155-2671", "415 555 2671", "0-12-345", "300 400 5000", "scores 0.91 0.88 0.83 0.79 0.71 0.64",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("around", ["{}", "{}부터", "값은 {}, 끝"])
def test_what_only_looks_like_personal_data_stays_the_same_object(text: str, around: str) -> None:
    whole = around.format(text)
    assert Redactor(personal=KINDS).text(whole) is whole


@pytest.mark.parametrize("number", [4111111111111111, 5555555555554444, 378282246310005])
def test_an_integer_that_is_a_card_is_replaced(number: int) -> None:
    assert Redactor(personal=KINDS).number(number) == "[card]"
    assert Redactor(personal=["email"]).number(number) == number


def test_an_integer_that_is_a_resident_number_or_a_mobile_phone_is_replaced() -> None:
    redactor = Redactor(personal=KINDS)
    assert redactor.number(int(resident("900101", 1).replace("-", ""))) == "[resident_number]"
    assert redactor.number(int(resident("050101", 3).replace("-", ""))) == "[resident_number]"
    assert redactor.number(1023456789) == "[phone]"
    assert redactor.number(821023456789) == "[phone]"


@pytest.mark.parametrize(
    "number",
    [0, -1, 912, 1767780000, 1767780000000, 1767780000000000, 1767780000000000000, 4111111111111112, 10**30, -4111111111111111,
     123456789, 99999999, True],
)  # fmt: skip
def test_any_other_integer_stays(number: int) -> None:
    assert Redactor(personal=KINDS).number(number) is number


# --- Whatever comes ---

EVIL = """a 1 - @ a@ 1- eyJ eyJ- eyJa. . 가 sk- sk_ a. key: password= token": :// a://a: a:b@ -a \\ " = : _ M1 AKIA 0 010- A < DE DE12
ghp_ xoxb- Bearer+ cookie:a= 1. 4111- 계좌 account +1 비밀번호: IA p t_""".split() + [
    " ", "\n", "1 ", "4111 ", "password: ", "Basic aaaaaaaaaaaa", DASHES, f"{DASHES}BEGIN ", f"{DASHES}BEGIN PRIVATE KEY{DASHES}",
    f"{DASHES}BEGIN PRIVATE KEY{DASHES}-a", "account ", "+1 ", "DE12 ", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("piece", EVIL)
def test_time_is_linear_in_the_text(piece: str) -> None:
    redactor = Redactor(personal=KINDS)
    text = (piece * 200_000)[:200_000]
    encoded = orjson.dumps(text.encode("utf-8", "replace").decode())
    started = time.process_time()
    redactor.text(text)
    redactor.may_hold_secret(encoded)
    assert time.process_time() - started < 2, "a tenth of it is the rule; squared, it would be a minute"


@given(st.text() | st.lists(PIECES | st.sampled_from([t for ts in MATCHING.values() for t in ts])).map("".join))
def test_no_text_raises(text: str) -> None:
    redactor = Redactor(personal=KINDS)
    assert isinstance(redactor.text(text), str)
    redactor.is_secret(text)


@given(st.integers())
def test_no_integer_raises(number: int) -> None:
    result: Any = Redactor(personal=KINDS).number(number)
    assert result == number or result in {"[card]", "[phone]", "[resident_number]"}
