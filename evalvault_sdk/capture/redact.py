r"""
Take secrets and personal data out of keys, texts and numbers.

In:   a key, a text, an integer or an encoded event, in the caller's thread.
Out:  the same with `[secret]`, `[email]`, `[phone]` and so on in place of what must not leave the process.
Pure, but for a bounded memory of keys, and today's date. Never raises. Takes time linear in the text: a repeat
either has a bound, or cannot begin again inside what it has just read.

Rather too little than too much: a trace full of `[phone]` where order numbers were helps nobody. A number counts if
its check digit is right, or its form is one that hardly anything else has, or a word beside it says what it is.
"""

from __future__ import annotations

import binascii
import datetime as dt
import re
from collections.abc import Callable, Collection

from evalvault_sdk.config import PersonalData

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
_HINT_K = re.compile(rb"k-(?:(?<=sk-)" + _SK.encode() + rb"|(?<=pk-)lf-)").search
_HINT_UNDERSCORE = re.compile(
    rb"_(?:(?<=[sr]k_)(?:live|test)_|(?<=gsk_)[A-Za-z0-9]{20}|(?<=gh[pousr]_)[A-Za-z0-9]{20}|(?<=github_)pat_"
    rb"|(?<=hf_)[A-Za-z0-9]{30}|(?<=npm_)[A-Za-z0-9]{30}|(?<=pcsk_)\w{20}|(?<=v2_sk_)\w{20}|(?<=v2_pt_)\w{20})"
).search
_HINT_P = re.compile(rb"p(?:at-[\w-]{20}|ypi-Ag)").search
_HINT_X = re.compile(rb"xox[a-z]-").search
_HINT_I = re.compile(rb"I(?:A[A-Z0-9]{16}|za[\w-]{35})").search
_HINT_J = re.compile(rb"eyJ[\w-]{8}").search
_HINT_B = re.compile(rb"B(?:earer [\w.~+/=-]{16}|asic [A-Za-z0-9+/]{8})").search
_HINT_PEM = re.compile(rb"PRIVATE KEY(?: BLOCK)?-----").search
_HINT_URL = re.compile(rb"://[^\s/\"'<>\\]+@").search
_HINT_COLON = re.compile(rb':(?<=[^"0-9]:)').search
_HINT_QUOTED = re.compile(rb'\\":').search
_HINT_ASSIGNMENT = re.compile(
    rb"[akpstcd\xeb\xed](?:%b|%b)(?!\":)[\\\"' ]{0,10}[:=]"
    % (_WORDS.encode(), b"|".join(word.encode()[1:] for word in ("비밀번호", "비번", "패스워드")))
).search

# --- Personal data. Hangul may stand beside it without a space, so what ends it are ASCII letters and digits only. ---
_LEFT = r"(?<![A-Za-z0-9_])(?<![A-Za-z0-9]-)(?<!\d\.)"
_RIGHT = r"(?![A-Za-z0-9_])(?![-.]\d)"
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_])", re.ASCII
)
_RESIDENT = re.compile(rf"{_LEFT}\d{{6}} ?[-–]? ?\d{{7}}{_RIGHT}", re.ASCII)
_CARD = re.compile(
    rf"{_LEFT}(?:\d{{13,19}}|\d{{4}}([ -])\d{{4}}\1\d{{4}}\1\d{{1,4}}(?:\1\d{{3}})?"
    rf"|\d{{4}}([ -])\d{{6}}\2\d{{4,5}}){_RIGHT}",
    re.ASCII,
)
#: First digits and lengths of the networks: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, and
#: the 9 of cards that are good in Korea only.
_CARD_PREFIX = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|(?:6011|65\d\d|64[4-9]\d|62\d\d|35[2-8]\d)\d{12,15}|9\d{15}",
    re.ASCII,
)
# Old (a letter and 8 digits), new (a letter among the digits since 2021), and the second line of the machine-readable
# zone of any country.
_PASSPORT = re.compile(
    r"(?<![A-Za-z0-9_<-])(?:[MSRGDO](?:\d{8}|\d{3}[A-Z]\d{4})"
    r"|(?P<zone>[A-Z0-9<]{9}\d[A-Z<]{3}\d{7}[MFX<]\d{7}[A-Z0-9<]{14}[\d<]\d))(?![A-Za-z0-9_<-])",
    re.ASCII,
)
_DATE = re.compile(r"(?:19|20)\d\d-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])", re.ASCII)
_BANK = r"(?:은행|뱅크|농협|금고|우체국|신협|수협)"
_ACCOUNT = re.compile(
    rf"""(?P<iban>(?<![A-Za-z0-9])[A-Z]{{2}}\d\d(?:\ ?[A-Z0-9]{{4}}){{2,7}}(?:\ ?[A-Z0-9]{{1,3}})?(?![A-Za-z0-9]))
    | {_LEFT}(?P<grouped>\d{{3,6}}(?:-\d{{1,7}}){{2,3}}){_RIGHT}
    | (?:계좌(?:\ ?번호)?|\b(?i:account|acct)\.?(?:\ ?(?i:number|no\.?))?)(?:은|는|이|가|로)?[\s:：=\#("']{{0,4}}
      (?:[가-힣A-Za-z]{{0,8}}{_BANK}[\s:)]{{0,2}})?(?P<named>\d(?:-?\d){{9,13}}){_RIGHT}
    | {_LEFT}(?P<followed>\d{{10,14}})(?=\ ?(?:번\ ?)?계좌)""",
    re.ASCII | re.VERBOSE,
)
#: How Korean banks group the digits. 3-4-4 and 3-3-4 are missing: those are phones; 3-2-5 is a business.
_GROUPINGS = frozenset(
    {"6-2-6", "3-3-6", "3-2-6", "4-3-6", "3-6-5", "3-6-3", "4-2-6", "4-2-7", "4-4-4"}
    | {"3-6-2-3", "3-4-4-2", "3-2-4-3", "4-4-4-1", "3-2-6-1", "4-2-6-1"}
)
_AREA = r"(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|80|50\d?|1[016-9])"
_PHONE = re.compile(
    rf"""{_LEFT}(?:
        0{_AREA}[-. )]?\ ?\d{{3,4}}[-. ]?\d{{4}} | \(0{_AREA}\)\ ?\d{{3,4}}[-. ]?\d{{4}}
      # Service numbers; a second half that is a year makes it a span of years.
      | (?:15(?:22|33|44|66|77|88|99)|16(?:00|11|22|33|44|55|61|66|68|70|77|88|99)|18(?:00|11|22|33|44|55|66|77|88|99))
        -(?!1[4-9]\d\d|20\d\d)\d{{4}}
      | (?:1[-. ])?(?:\([2-9]\d\d\)\ ?[2-9]\d\d[-. ]|[2-9]\d\d-[2-9]\d\d-|[2-9]\d\d\.[2-9]\d\d\.)\d{{4}}
      | \+82[-. ]?(?:\(0\)|0)?{_AREA}[-. ]?\d{{3,4}}[-. ]?\d{{4}}
      | (?<!\+)\+[1-9](?:[-. ()]{{0,2}}\d){{8,14}}
    ){_RIGHT}""",
    re.ASCII | re.VERBOSE,
)
_MOBILE_NUMBER = re.compile(r"(?:82)?10[2-9]\d{7}", re.ASCII)
_LONG_NUMBER = re.compile(r"\d[\d() .–-]{6}", re.ASCII)


class Redactor:
    """What is to be taken out, and the way to do it. Shared by all threads."""

    __slots__ = ("_kinds", "_passes", "_secrets", "active", "personal", "verdicts")

    def __init__(self, *, secrets: bool = True, personal: Collection[PersonalData] = ()) -> None:
        self._secrets = secrets
        self._kinds = frozenset(personal)
        self._passes = [each for each in _PERSONAL if each[0] in self._kinds]
        #: Whether any kind of personal data is to be redacted.
        self.personal = bool(self._kinds)
        #: Whether anything is to be redacted at all.
        self.active = secrets or self.personal
        #: Keys judged so far. Cleared when full; may be read by whoever is in a hurry.
        self.verdicts: dict[str, bool] = {}

    def is_secret(self, key: str) -> bool:
        """Return whether the value under `key` is a secret."""
        verdict = self.verdicts.get(key)
        if verdict is None:
            verdict = self._secrets and _secret_key(key)
            if len(key) <= _MAX_KEY:
                if len(self.verdicts) >= _MAX_VERDICTS:
                    self.verdicts.clear()
                self.verdicts[key] = verdict
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
        if not self.personal or not 10**8 <= number < 10**19:
            return number
        digits = str(number)
        # An account number is a number like any other if no word stands beside it, so it is never told here.
        # Whoever was born from 2001 to 2009 has a zero in front, which an integer loses.
        if "resident_number" in self._kinds and number >= 10**11 and _is_resident_number(digits.zfill(13)):
            return "[resident_number]"
        if "card" in self._kinds and _is_card(digits):
            return "[card]"
        if "phone" in self._kinds and _MOBILE_NUMBER.fullmatch(digits):
            return "[phone]"
        return number

    def may_hold_secret(self, encoded: bytes, start: int = 0) -> bool:
        """Return False only if `text` would surely take no secret out of any string in this JSON from `start` on."""
        # A byte is looked up ten times faster than a pattern: most events have no K, no J, no @ in them.
        return self._secrets and bool(
            (107 in encoded and _HINT_K(encoded, start))  # k
            or _HINT_UNDERSCORE(encoded, start)
            or _HINT_P(encoded, start)
            or (120 in encoded and _HINT_X(encoded, start))  # x
            or (73 in encoded and _HINT_I(encoded, start))  # I
            or (74 in encoded and _HINT_J(encoded, start))  # J
            or (66 in encoded and _HINT_B(encoded, start))  # B
            or (75 in encoded and _HINT_PEM(encoded, start))  # K
            or (64 in encoded and _HINT_URL(encoded, start))  # @
            or (  # =, or a colon inside a text
                (61 in encoded or (92 in encoded and _HINT_QUOTED(encoded, start)) or _HINT_COLON(encoded, start))
                and _HINT_ASSIGNMENT(encoded.lower())
            )
        )

    def _without_secrets(self, text: str) -> str:
        if "PRIVATE KEY" in text:
            text = _PEM.sub(SECRET, text)
        text = _TOKEN.sub(_token, text)
        if "@" in text:
            text = _URL.sub(f"{SECRET}@", text)
        return self._without_assigned(text) if "=" in text or ":" in text else text

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


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdigit()]


def _is_resident_number(digits: str) -> bool:
    """Return whether 13 digits are the registration number of a Korean resident or foreigner."""
    if len(digits) != 13:
        return False
    kind = int(digits[6])
    century = (1800, 1900, 1900, 2000, 2000, 1900, 1900, 2000, 2000, 1800)[kind]
    try:
        born = dt.date(century + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))
    except ValueError:
        return False
    # Since October 2020 the last six digits are drawn by lot. Whoever was born before has, as a rule, the older kind.
    if born >= dt.date(2020, 10, 5):
        return born <= dt.date.today()
    total = sum(
        int(digit) * weight for digit, weight in zip(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=False)
    )
    # Residents: (11 - total mod 11) mod 10; foreigners (5 to 8): two more, that is (13 - total mod 11) mod 10.
    return int(digits[12]) == ((13 if 5 <= kind <= 8 else 11) - total % 11) % 10


def _is_card(digits: str) -> bool:
    """Return whether the digits begin like a payment card's and fulfil Luhn's rule."""
    if not _CARD_PREFIX.fullmatch(digits):
        return False
    doubled = "0246813579"
    return (sum(map(int, digits[-1::-2])) + sum(int(doubled[int(digit)]) for digit in digits[-2::-2])) % 10 == 0


def _resident(match: re.Match[str]) -> str:
    return "[resident_number]" if _is_resident_number("".join(map(str, _digits(match[0])))) else match[0]


def _card(match: re.Match[str]) -> str:
    digits = "".join(map(str, _digits(match[0])))
    if _is_card(digits):
        return "[card]"
    # The three digits of its back may follow a number of sixteen.
    return f"[card]{match[0][19:]}" if match[1] and len(digits) == 19 and _is_card(digits[:16]) else match[0]


def _passport(match: re.Match[str]) -> str:
    zone = match["zone"]
    if zone is None:
        return match[0] if _DATE.fullmatch(match[0][1:]) else "[passport]"
    values = ("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ".find(character) for character in zone[:9].replace("<", "0"))
    return "[passport]" if sum(v * w for v, w in zip(values, (7, 3, 1) * 3, strict=True)) % 10 == int(zone[9]) else zone


def _account(match: re.Match[str]) -> str:
    whole = match[0]
    if iban := match["iban"]:
        while len(iban) > 14:  # a word in capitals may have been taken for its last group
            if int("".join(str(int(c, 36)) for c in (iban[4:] + iban[:4]).replace(" ", ""))) % 97 == 1:
                return f"[account]{whole[len(iban) :]}"
            iban = iban.rpartition(" ")[0]
        return whole
    if grouped := match["grouped"]:
        known = "-".join(str(len(group)) for group in grouped.split("-")) in _GROUPINGS
        # 050x-xxxx-xxxx is a phone, 2026-01-000001 and 2026-0107-0001 are numbered by date.
        return whole if not known or (grouped.startswith(("050", "19", "20")) and grouped[4] == "-") else "[account]"
    if named := match["named"]:
        return whole[: -len(named)] + "[account]"
    return "[account]"


def _always(kind: PersonalData) -> Callable[[re.Match[str]], str]:
    return lambda match: f"[{kind}]"


def _has_at(text: str) -> bool:
    return "@" in text


def _has_long_number(text: str) -> bool:
    return _LONG_NUMBER.search(text) is not None


_Pass = tuple[PersonalData, Callable[[str], bool], re.Pattern[str], Callable[[re.Match[str]], str]]
#: In this order: what has a check digit goes before what has only a form. Ordinary texts have no long number in them:
#: they are done after a quick look.
_PERSONAL: list[_Pass] = [
    ("email", _has_at, _EMAIL, _always("email")),
    ("passport", bool, _PASSPORT, _passport),
    ("resident_number", _has_long_number, _RESIDENT, _resident),
    ("card", _has_long_number, _CARD, _card),
    ("account", _has_long_number, _ACCOUNT, _account),
    ("phone", _has_long_number, _PHONE, _always("phone")),
]
