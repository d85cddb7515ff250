"""The docs: their examples do what they show, their links lead somewhere, the site has every page.

None of this needs what builds the site (``make docs``).
"""

import doctest
import re
from pathlib import Path

import pytest
import yaml

import less_cache

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/*/*.md", "plugins/*/*.md")
TEXTS = [*PAGES, *(path for pattern in OTHERS for path in sorted(ROOT.glob(pattern)))]

FENCE = re.compile(r"^```.*$", re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def anchors(path):
    """The anchors of a page's headings."""
    headings = HEADING.findall(BLOCK.sub("", path.read_text(encoding="utf-8")))
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


def in_nav(entry):
    if isinstance(entry, dict):
        return [page for part in entry.values() for page in in_nav(part)]
    return [page for part in entry for page in in_nav(part)] if isinstance(entry, list) else [entry]


@pytest.mark.parametrize(
    "path", [path for path in PAGES if ">>> " in path.read_text(encoding="utf-8")], ids=name_of
)
def test_examples(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    examples = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    assert not doctest.DocTestRunner().run(examples).failed


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links(path):
    missing = []
    for target, anchor in LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        found = path.parent / target if target else path
        # What the build of the site makes.
        if found == DOCS / "api" / "commands.md":
            continue
        if not found.exists() or (anchor and anchor not in anchors(found)):
            missing.append(f"{target}#{anchor}")
    assert not missing


def test_every_page_is_on_the_site():
    nav = in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(nav) == len(set(nav))
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} <= set(nav)
    examples = (ROOT / "examples").glob("[!_]*.py")
    assert {f"examples/{path.name}.md" for path in examples} <= set(nav)


@pytest.mark.parametrize("name", [*less_cache.__all__, "attach", "LessCache"])
def test_every_public_name_is_in_the_reference(name):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    assert re.search(rf"^::: less_cache\.([\w.]+\.)?{name}$", pages, re.MULTILINE)


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == less_cache.__version__


def test_the_front_page_takes_sections_that_the_readme_has():
    wanted = re.findall(r"<!-- README: (.+) -->", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert wanted
    headings = HEADING.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(wanted) <= set(headings)
