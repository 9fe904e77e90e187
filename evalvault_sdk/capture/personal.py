"""
Tell personal data in texts and numbers.

In:   the kinds that are wanted.
Out:  patterns to replace (`passes`), and a verdict on single numbers (`number`).
Pure, but for today's date. Takes time linear in the text: a repeat either has a bound, or cannot begin again inside
what it has just read.

Rather too little than too much: a trace full of `[phone]` where order numbers were helps nobody. A number counts if
its check digit is right, or its form is one that hardly anything else has, or a word beside it says what it is.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Collection

from evalvault_sdk.config import PersonalData

#: The kind, a quick look whether it may be there, the pattern, and what stands in place of a match.
Pass = tuple[PersonalData, Callable[[str], bool], re.Pattern[str], Callable[[re.Match[str]], str]]

# Hangul may stand beside a number without a space, so what ends it are ASCII letters and digits only.
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


def passes(kinds: Collection[PersonalData]) -> list[Pass]:
    """Return what is to be looked for, in the order in which it is to be replaced."""
    return [each for each in _PASSES if each[0] in kinds]


def number(number: int, kinds: Collection[PersonalData]) -> int | str:
    """Return what stands in place of `number` if it is personal data in itself, else `number`."""
    if not 10**8 <= number < 10**19:
        return number
    digits = str(number)
    # An account number is a number like any other if no word stands beside it, so it is never told here.
    # Whoever was born from 2001 to 2009 has a zero in front, which an integer loses.
    if "resident_number" in kinds and number >= 10**11 and _is_resident_number(digits.zfill(13)):
        return "[resident_number]"
    if "card" in kinds and _is_card(digits):
        return "[card]"
    if "phone" in kinds and _MOBILE_NUMBER.fullmatch(digits):
        return "[phone]"
    return number


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


#: In this order: what has a check digit goes before what has only a form. Ordinary texts have no long number in them:
#: they are done after a quick look.
_PASSES: list[Pass] = [
    ("email", _has_at, _EMAIL, _always("email")),
    ("passport", bool, _PASSPORT, _passport),
    ("resident_number", _has_long_number, _RESIDENT, _resident),
    ("card", _has_long_number, _CARD, _card),
    ("account", _has_long_number, _ACCOUNT, _account),
    ("phone", _has_long_number, _PHONE, _always("phone")),
]
