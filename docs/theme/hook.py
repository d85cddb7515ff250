"""What the site takes from outside docs/: other pages, pictures, the commands.

Links are those of the repository, so that its files read well by themselves; here
they are turned into the site's.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/serve/README.md",
    "examples/tensorrt/README.md",
    "plugins/trt/README.md",
)
CODE = tuple(
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "examples").glob("[!_]*.py"))
)
"""Shown as pages of their own."""
COMMANDS = "api/commands.md"

LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")
NAMED = re.compile(r"\[[\w./-]+\.md\]\(([^)#\s]+\.md)")
"""Links whose text is the name of a page's file."""
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
SECTION = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    pictures = [
        path.relative_to(ROOT)
        for path in (ROOT / "benchmarks/results").glob("*.png")
    ]
    for name in (*PAGES, *map(str, sorted(pictures))):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name in CODE:
        code = (ROOT / name).read_text(encoding="utf-8")
        title = posixpath.basename(name)
        page = f"---\nhide: [toc]\n---\n\n# {title}\n\n```python\n{code}```\n"
        files.append(File.generated(config, f"{name}.md", content=page))
    files.append(File.generated(config, COMMANDS, content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what a page takes from the README, and turn links into the site's."""
    name = page.file.src_uri
    at = name if name in PAGES else f"docs/{name}"
    text = _site_links(markdown, at, name)
    return SECTION.sub(lambda mark: _readme(mark[1], name), text)


def _site_links(markdown: str, at: str, page: str) -> str:
    """The links of the file `at` of the repository as a page is to have them."""

    def titled(link: re.Match[str]) -> str:
        target = ROOT / posixpath.dirname(at) / link[1]
        title = TITLE.search(target.read_text(encoding="utf-8"))
        return link[0] if title is None else f"[{title[1]}]({link[1]}"

    named = NAMED.sub(titled, markdown)
    return LINK.sub(lambda link: _site_link(link[1], at, page), named)


def _site_link(link: str, at: str, page: str) -> str:
    """What a link of the file `at` of the repository is on a page of the site."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(at), link))
    if target in CODE:
        target += ".md"
    target = target.removeprefix("docs/")
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _readme(section: str, page: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n## {section}\n")
    if not found:
        raise PluginError(f"{page}: the README has no section {section!r}")
    body = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return _site_links(body, "README.md", page).strip()


def _commands() -> str:
    """Every command with its options, as its ``--help`` tells them."""
    docs = [sys.executable, "-m", "typer", "less_cache.cli.main", "utils", "docs"]
    docs += ["--name", "less-cache", "--title", "Commands"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        docs,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise PluginError(f"{COMMANDS}: {' '.join(docs)} failed:\n{done.stderr}")
    return done.stdout
