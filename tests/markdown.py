"""
Read Markdown as the tests of the README and the guides need it.

In:   the text of a page.
Out:  its blocks of code, rows of tables, headings and links.
Pure. Anchors are those that GitHub gives to headings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_FENCE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_ROW = re.compile(r"^\| (.*) \|$", re.MULTILINE)


def code_blocks(language: str, text: str) -> list[str]:
    """Return what is in the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return _FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """Return the level and the text of each heading."""
    return [(len(marks), title.strip()) for marks, title in _HEADING.findall(prose(text))]


def anchors(text: str) -> list[str]:
    """Return the anchor of each heading, in order."""
    seen: Counter[str] = Counter()
    found = []
    for _, title in headings(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def links(text: str) -> list[str]:
    """Return where the links of a page lead, in order; what looks like one in code is none."""
    return _LINK.findall(_CODE.sub("", prose(text)))


def section(text: str, title: str) -> str:
    """Return what stands below a heading, up to the next one of its level or above. Raises `LookupError`."""
    begin: int | None = None
    level = 0
    for heading in _HEADING.finditer(_FENCE.sub(lambda block: " " * len(block[0]), text)):
        depth = len(heading[1])
        if begin is not None and depth <= level:
            return text[begin : heading.start()]
        if begin is None and heading[2].strip() == title:
            begin, level = heading.end(), depth
    if begin is None:
        raise LookupError(title)
    return text[begin:]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of all tables whose first cell begins with code: headers do not."""
    rows = [[cell.strip() for cell in re.split(r" \|(?= |$)", row)] for row in _ROW.findall(prose(text))]
    return [row for row in rows if row[0].startswith("`")]


def code_spans(text: str) -> Iterator[str]:
    """Yield what stands in backticks."""
    for _, span in _CODE.findall(text):
        yield span.strip()
