r"""
Take secrets and personal data out of keys, texts and numbers.

In:   a key, a text, an integer or an encoded event, in the caller's thread or the worker's.
Out:  the same with `[secret]`, `[email]`, `[phone]` and so on in place of what must not leave the process.
Pure, but for a bounded memory of keys. Never raises. Takes time linear in the text: a repeat either has a bound, or
cannot begin again inside what it has just read. What personal data look like is in `capture.personal`.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import orjson

from evalvault_sdk.config import PersonalData

if TYPE_CHECKING:
    from evalvault_sdk.capture.personal import Pass

#: What stands in place of a secret.
SECRET = "[secret]"  # noqa: S105 - the opposite of one

#: So many verdicts on keys are remembered. Keys of events repeat; a program that makes them up must not cost memory.
_MAX_VERDICTS = 4096
#: A key is judged by its end: what it ends in says what the value is (`password_policy_id` is an id).
_MAX_KEY = 128

# --- Keys. Matched against a key in snake_case. ---
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\s.:/\[\]-]+", re.ASCII)
_KEY_KINDS = "api|access|secret|private|encryption|signing|subscription|account|master|service|ssh|auth"
_SECRET_KEY = re.compile(
    rf"""(?:authorization | (?:^|_)(?:{_KEY_KINDS})_?keys? | apikeys? | passw(?:or)?ds? | passphrase
      | (?:^|_)(?:pwd|passcode) | secrets? | (?:^|_)credentials? | (?:^|_)(?:set_?)?cookies? | (?:^|_)(?:dsn|bearer|jwt)
      | conn(?:ection)?_?str(?:ing)?
      | 비밀번호 | 비번 | 패스워드 | 인증키 | (?:access|refresh|auth)_?tokens
      | (?:^|_)(?:access|refresh|auth|id|session|csrf|xsrf|bearer|api)?token
    )(?:_(?:value|hash|header|plain|base64|b64|pem|json))?(?:_?\d{{1,4}})?$""",
    re.VERBOSE,
)

# Tokens that are pieces of a text, or places in a list: next_page_token only says where to go on.
_PLAIN_TOKEN = re.compile(
    r"(?:^|_)(?:first|last|next|page|sync|continuation|per|inter|stop|special|eos|bos|pad|unk|sep|cls|mask|max|num|"
    r"input|output|prompt|completion|total|cached|reasoning|new|each)_token$"
)

# --- Secrets in texts. ---
# A slug may begin with sk- as well ("sk-learn-..."): the body of a key has a long run, with a digit in it or longer.
_SK = (
    r"(?:(?:proj|ant|svcacct|admin|lf)-[\w-]{20,}"
    r"|(?:[a-z0-9]{2,8}-){0,2}(?:(?=[A-Za-z]{0,60}\d)[A-Za-z0-9]{20,}|[A-Za-z]{32,}))"
)
_TOKEN = re.compile(
    rf"""(?<![A-Za-z0-9])(?:
        sk-{_SK} | pk-lf-[\w-]{{20,}} | (?:sk|rk)_(?:live|test)_[A-Za-z0-9]{{16,}} | gsk_[A-Za-z0-9]{{20,}}
      | pcsk_\w{{20,}} | lsv2_(?:pt|sk)_\w{{20,}} | (?:AKIA|ASIA)[A-Z0-9]{{16}}(?![A-Za-z0-9]) | AIza[\w-]{{35}}
      | gh[pousr]_[A-Za-z0-9]{{20,}} | github_pat_\w{{22,}} | glpat-[\w-]{{20,}} | xox[a-z]-[A-Za-z0-9-]{{10,}}
      | hf_[A-Za-z0-9]{{30,}} | npm_[A-Za-z0-9]{{30,}} | pypi-Ag[\w-]{{30,}}
      # A JSON Web Token, signed or encrypted. It must not begin inside a run of its own characters, or time is squared.
      | (?<![\w-])eyJ[\w-]{{8,}}\.(?:eyJ[\w-]{{4,}}\.[\w-]+|[\w-]*\.[\w-]{{8,}}\.[\w-]{{8,}}\.[\w-]{{8,}})
    )
    | (?<=\bBearer\ )(?:(?=[^\s\d]{{0,40}}\d)[\w.~+/=-]{{16,}}|[\w.~+/=-]{{32,}})
    | (?<=\bBasic\ )(?P<basic>[A-Za-z0-9+/]{{8,}}={{0,2}})""",
    re.ASCII | re.VERBOSE,
)
# From BEGIN to END, or as much of it as looks like a key where the text was cut before END.
_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]*(?:-(?!----)[^-]*)*-----END [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----|(?:[A-Za-z0-9+/=\s\\]{16,})?)"
)
_URL = re.compile(r"(?<=[A-Za-z0-9]://)[^\s\x00-\x1f/?#@:\"'<>\\]{0,128}:[^\s\x00-\x1f/?#\"'<>\\]{1,256}@(?=[\w\[])")
# The end of a key and what may stand between it and its value; the rest of the key is looked up to the left.
# A set of first letters, not a choice of words: it is what the search skips ahead by.
_WORDS = r"uthorization|eys?|assw(?:or)?d|assphrase|asscode|wd|ecret|oken|redentials?|ookie|sn|onnection[ _-]?string"
_ASSIGNMENT = re.compile(
    rf"[akpstcdAKPSTCD비패](?:(?i:{_WORDS})|밀번호|번|스워드)(?P<between>\\{{0,3}}[\"']? ?(?P<sign>[:=])=? {{0,3}})",
    re.ASCII,
)
_KEY_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"
_COOKIES = re.compile(r"\\{0,3}[\"']?([^\s=;\"'\\]{1,128}=[^\r\n\"'\\]+)")
_SCHEMED = re.compile(
    r"\\{0,3}[\"']?(?i:bearer|basic|token|digest|negotiate|apikey|bot) +(?!\[secret\])([^\s\"',;\\]+)"
)
# To the quote that opened it. In JSON within a text the quotes are escaped, and so would be one inside.
_QUOTED = re.compile(
    r"(?:\\{1,3}[\"'](?!\[secret\])(?P<escaped>(?:[^\"\\\r\n]|\\{3}[\"'])+)"
    r"|\"(?!\[secret\])(?P<double>(?:[^\"\\\r\n]|\\.)+)|'(?!\[secret\])(?P<single>(?:[^'\\\r\n]|\\.)+))"
)
_UNQUOTED = re.compile(r"(?!\[secret\])([!#-%(-+\--:<-\[^-|~?]{8,})")

# --- May an encoded event hold one? A literal to begin with is what makes these fast; none may look at what stands
# before a secret, since there may be the end of an escape such as \n. ---
_HINT_HYPHEN = re.compile(
    rb"-(?<=[kti]-)(?:(?<=sk-)" + _SK.encode() + rb"|(?<=pk-)lf-|(?<=glpat-)[\w-]{20}|(?<=pypi-)Ag)"
).search
_HINT_X = re.compile(rb"x(?<=xox)[a-z]-").search
_HINT_UNDERSCORE = re.compile(
    rb"_(?=\w{16})(?:(?<=[sr]k_)(?:live|test)_|(?<=gsk_)[A-Za-z0-9]{20}|(?<=gh[pousr]_)[A-Za-z0-9]{20}"
    rb"|(?<=github_)pat_|(?<=hf_)[A-Za-z0-9]{30}|(?<=npm_)[A-Za-z0-9]{30}|(?<=pcsk_)\w{20}|(?<=v2_sk_)\w{20}"
    rb"|(?<=v2_pt_)\w{20})"
).search
_HINT_I = re.compile(rb"I(?:A[A-Z0-9]{16}|za[\w-]{35})").search
_HINT_J = re.compile(rb"eyJ[\w-]{8}").search
_HINT_B = re.compile(rb"B(?:earer [\w.~+/=-]{16}|asic [A-Za-z0-9+/]{8})").search
_HINT_PEM = re.compile(rb"PRIVATE KEY(?: BLOCK)?-----").search
_HINT_URL = re.compile(rb"://[^\s/\"'<>\\]+@").search
# A sign inside a text. In JSON a colon behind a quote is none, unless the quote is escaped; nor are those of times.
_EQUALS = re.compile(rb"=").finditer
_COLON = re.compile(rb':(?<=[^"0-9]:)')
_QUOTED_COLONS = re.compile(rb'\\":').finditer
#: What may stand before one, and so many bytes of it at most.
_HINT_ASSIGNMENT = re.compile(
    rb"[akpstcd\xeb\xed](?:%b|%b)(?!\":)[\\\"' ]{0,10}[:=]\Z"
    % (_WORDS.encode(), b"|".join(word.encode()[1:] for word in ("비밀번호", "비번", "패스워드")))
).search
_ASSIGNED_BYTES = 32
#: Characters beyond which a text is encoded to see whether it may hold one: that takes a tenth of looking for it.
_LONG = 500
#: So many encoded events are looked at one by one, more at once; but no more bytes than these.
_FEW = 16
_MUCH = 1 << 20


class Redactor:
    """What is to be taken out, and the way to do it. Shared by all threads."""

    __slots__ = ("_kinds", "_number", "_passes", "_secrets", "active", "innocent", "personal", "verdicts")

    def __init__(self, *, secrets: bool = True, personal: Collection[PersonalData] = ()) -> None:
        self._secrets = secrets
        self._kinds = frozenset(personal)
        self._passes: list[Pass] = []
        self._number: Callable[[int, Collection[PersonalData]], int | str] | None = None
        if personal:
            from evalvault_sdk.capture import personal as patterns  # not for every program that imports us

            self._passes, self._number = patterns.passes(self._kinds), patterns.number
        #: Whether any kind of personal data is to be redacted.
        self.personal = bool(self._kinds)
        #: Whether anything is to be redacted at all.
        self.active = secrets or self.personal
        #: Keys judged so far. Cleared when full.
        self.verdicts: dict[str, bool] = {}
        #: Those among them whose values are no secrets; for whoever is in a hurry.
        self.innocent: set[str] = set()

    def is_secret(self, key: str) -> bool:
        """Return whether the value under `key` is a secret."""
        verdict = self.verdicts.get(key)
        if verdict is None:
            key = key[:]  # of a subclass of str, with whatever it refers to, the text alone
            verdict = self._secrets and _secret_key(key)
            if len(key) <= _MAX_KEY:
                if len(self.verdicts) >= _MAX_VERDICTS:
                    self.verdicts.clear()
                    self.innocent.clear()
                self.verdicts[key] = verdict
                if not verdict:
                    self.innocent.add(key)
        return verdict

    def text(self, text: str) -> str:
        """Return `text` with everything that matches replaced; the same object if nothing does."""
        redacted = self._without_secrets(text) if self._secrets else text
        for _, may_match, pattern, check in self._passes:
            if may_match(redacted):
                redacted = pattern.sub(check, redacted)
        return text if redacted == text else redacted

    def number(self, number: int) -> int | str:
        """Return what stands in place of `number` if it is personal data in itself, else `number`."""
        return self._number(number, self._kinds) if self._number is not None else number

    def may_hold_secret(self, encoded: bytes, start: int = 0) -> bool:
        """Return False only if `text` would surely take no secret out of any string in this JSON from `start` on."""
        # A byte is looked up ten times faster than a pattern: most events have no K, no J, no @ in them.
        return self._secrets and bool(
            _HINT_HYPHEN(encoded, start)
            or _HINT_UNDERSCORE(encoded, start)
            or (120 in encoded and _HINT_X(encoded, start))  # x
            or (73 in encoded and _HINT_I(encoded, start))  # I
            or (74 in encoded and _HINT_J(encoded, start))  # J
            or (66 in encoded and _HINT_B(encoded, start))  # B
            or (75 in encoded and _HINT_PEM(encoded, start))  # K
            or (64 in encoded and _HINT_URL(encoded, start))  # @
            or (61 in encoded and _hints_at_assignment(_EQUALS(encoded, start)))  # =
            or (_COLON.search(encoded, start) and _hints_at_assignment(_COLON.finditer(encoded, start)))
            or (92 in encoded and _hints_at_assignment(_QUOTED_COLONS(encoded, start)))  # a backslash
        )

    def suspects(self, encoded: Sequence[bytes]) -> list[int]:
        """Return the places of those that may hold one, looking at many at a time."""
        count = len(encoded)
        if count <= _FEW:
            return [number for number, one in enumerate(encoded) if self.may_hold_secret(one)]
        # Joined by what no JSON has in it, and nothing that is looked for.
        if sum(map(len, encoded)) <= _MUCH and not self.may_hold_secret(b"\n".join(encoded)):
            return []
        part = -(-count // 4)
        starts = range(0, count, part)
        return [start + number for start in starts for number in self.suspects(encoded[start : start + part])]

    def _without_secrets(self, text: str) -> str:
        if len(text) > _LONG and not self._may_hold_secret(text):
            return text
        if "PRIVATE KEY" in text:
            text = _PEM.sub(SECRET, text)
        text = _TOKEN.sub(_token, text)
        if "@" in text:
            text = _URL.sub(f"{SECRET}@", text)
        return self._without_assigned(text) if "=" in text or ":" in text else text

    def _may_hold_secret(self, text: str) -> bool:
        try:
            return self.may_hold_secret(orjson.dumps(text))
        except orjson.JSONEncodeError:  # a lone surrogate
            return True

    def _without_assigned(self, text: str) -> str:
        """Return `text` without the values of `password: ...` and its like."""
        kept: list[str] = []
        done = 0
        for match in _ASSIGNMENT.finditer(text):
            start, end = match.start(), match.end()
            if start < done:
                continue
            left = text[max(0, start - _MAX_KEY) : start]
            key = left[len(left.rstrip(_KEY_CHARACTERS)) :] + text[start : match.start("between")]
            if left[-1:] == " " and key.lower() in ("key", "keys", "token"):  # "API key: ...", "first token: ..."
                left = left[:-1]
                key = f"{left[len(left.rstrip(_KEY_CHARACTERS)) :]}_{key}"
            value = _value(text, end, key, match["sign"]) if self.is_secret(key) else None
            if value:
                kept += text[done : value[0]], SECRET
                done = value[1]
        return "".join(kept) + text[done:] if kept else text


def _hints_at_assignment(signs: Iterable[re.Match[bytes]]) -> bool:
    """Whether a key of a secret may stand before one of these signs in an encoded event."""
    for sign in signs:
        end = sign.end()
        if _HINT_ASSIGNMENT(sign.string[max(0, end - _ASSIGNED_BYTES) : end].lower()):
            return True
    return False


def _secret_key(key: str) -> bool:
    snake = _CAMEL.sub("_", key[-_MAX_KEY:]).lower()
    return _SECRET_KEY.search(snake) is not None and _PLAIN_TOKEN.search(snake) is None


def _value(text: str, start: int, key: str, sign: str) -> tuple[int, int] | None:
    """Return where the value that begins at `start` is, or None if it is more likely a word of the sentence."""
    if key.lower().endswith("cookie") and (cookies := _COOKIES.match(text, start)):
        return cookies.span(1)
    given = _SCHEMED.match(text, start)
    if given:
        return given.span(1)
    given = _QUOTED.match(text, start)
    if given:
        return given.span(given.lastgroup or 0)
    given = _UNQUOTED.match(text, start)
    if given and not (sign == ":" and given[1].rstrip(".?!").isalpha() and given[1][1:].islower()):
        return given.span(1)
    return None


def _token(match: re.Match[str]) -> str:
    basic = match["basic"]
    if basic is None:
        return SECRET
    try:  # "Basic JavaScript" is no user:password
        return SECRET if b":" in binascii.a2b_base64(basic[: len(basic[:400]) // 4 * 4]) else basic
    except binascii.Error:
        return basic
