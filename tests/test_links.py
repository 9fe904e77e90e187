"""Every link in the repository's Markdown leads somewhere, and what finds the broken ones does find them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.markdown import anchors, code_blocks, links, section, table_rows
from tests.support import ROOT
from tests.tools.links import html_problems, markdown_problems


def markdown_files() -> list[Path]:
    """Return the files of the repository; of a source distribution, which has no git, all that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    folders = (ROOT, ROOT / "docs", ROOT / "examples")
    return sorted({file for folder in folders for file in folder.glob("*.md" if folder == ROOT else "**/*.md")})


def test_every_link_of_every_page_leads_somewhere() -> None:
    files = markdown_files()
    assert {"README.md", "README.ko.md", "OPERATIONS.md"} <= {file.name for file in files}
    assert markdown_problems(files, ROOT) == []


def test_broken_links_of_markdown_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n\n## 한국어 제목, `code()`\n\n## One heading\n\n"
        "[a](#one-heading) [b](#한국어-제목-code) [c](#one-heading-1) [d](page.md#one-heading) [e](https://example.com)\n"
        "`[code](no-link.md)`\n\n```python\n# [code](no-link.md)\n```\n\n"
        "[f](gone.md) [g](#gone) [h](page.md#gone) [i](../outside.md) [j](file:///etc/passwd)\n",
        encoding="utf-8",
    )
    (tmp_path.parent / "outside.md").touch()
    assert markdown_problems([page], tmp_path) == [
        "page.md: gone.md",
        "page.md: #gone",
        "page.md: page.md#gone",
        "page.md: ../outside.md",
        "page.md: file:///etc/passwd",
    ]


def test_broken_links_of_html_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="#top">1</a><a href="sub/b.html#%EC%A0%9C%EB%AA%A9">2</a>'
        '<a href="https://example.com">3</a><img src="data:image/png;base64,AA=="><a href="notes.txt">4</a>'
        '<a href="#gone">5</a><a href="sub/c.html">6</a><a href="notes.txt#top">7</a>',
        encoding="utf-8",
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="제목">B</h1><a href="../a.html#bottom">8</a>', encoding="utf-8")
    (tmp_path / "notes.txt").touch()
    assert html_problems(tmp_path) == [
        "a.html: #gone",
        "a.html: sub/c.html",
        "a.html: notes.txt#top",
        "sub/b.html: ../a.html#bottom",
    ]


PAGE = """# Title

## First `part()`

| `a` | b |
| --- | --- |
| `one` | [x](y.md) |
| two | no row of interest |

```python
# not a heading
```

### Below

text

## Second
"""


def test_a_page_is_read_as_github_reads_it() -> None:
    assert anchors(PAGE) == ["title", "first-part", "below", "second"]
    assert links(PAGE) == ["y.md"]
    assert code_blocks("python", PAGE) == ["# not a heading\n"]
    assert table_rows(section(PAGE, "First `part()`")) == [["`a`", "b"], ["`one`", "[x](y.md)"]]
    assert "text" in section(PAGE, "First `part()`")
    assert section(PAGE, "Below").strip() == "text"
    with pytest.raises(LookupError):
        section(PAGE, "Third")
