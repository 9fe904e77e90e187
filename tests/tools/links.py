"""
Find links that lead nowhere, in Markdown and in HTML, without the network.

In:   the Markdown files of the repository; or a folder of HTML files.
Out:  a line for each broken link: the file, and where the link leads.

Files and anchors are looked up; addresses of the web are not asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.markdown import anchors, links


class Page(HTMLParser):
    """The links and anchors of an HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Take note of what a tag links to, and of its id."""
        for name, value in attributes:
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)
            elif value and name in ("href", "src") and not value.startswith("data:"):
                self.links.append(value)


def markdown_problems(files: Iterable[Path], root: Path) -> list[str]:
    """Return the broken links of Markdown files; a link that leads out of `root` is broken, too."""
    problems = []
    for file in files:
        for link in links(file.read_text(encoding="utf-8")):
            if not _leads_somewhere(file, link, root):
                problems.append(f"{file.relative_to(root)}: {link}")
    return problems


def html_problems(root: Path) -> list[str]:
    """Return the broken links of all HTML files in a folder."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(root.rglob("*.html"))}
    problems = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()
            there = target in pages or target.is_file()
            if not there or (parts.fragment and unquote(parts.fragment) not in _anchors_of(pages, target)):
                problems.append(f"{file.relative_to(root)}: {link}")
    return problems


def _leads_somewhere(file: Path, link: str, root: Path) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return parts.scheme in ("http", "https", "mailto")
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()
    if not target.is_relative_to(root.resolve()) or not target.exists():
        return False
    if not parts.fragment:
        return True
    return target.suffix == ".md" and unquote(parts.fragment) in anchors(target.read_text(encoding="utf-8"))


def _anchors_of(pages: dict[Path, Page], target: Path) -> set[str]:
    return pages[target].anchors if target in pages else set()
