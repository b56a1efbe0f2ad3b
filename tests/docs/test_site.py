"""The documentation as a site, and README.md: links, tables that are made from the package, lengths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import FENCE, PAGES
from settings_tables import TABLE, TABLES, with_tables
from site_links import with_links_of_site
from support import ROOT

from sdar_lm_eval import arguments
from sdar_lm_eval.engines.registry import ENGINES

LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
README = ROOT / "README.md"


def test_readme_is_short() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1500


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_line_of_prose_is_long(page: Path) -> None:
    lines = FENCE.sub("", page.read_text("utf-8")).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def anchors(text: str) -> set[str]:
    """The names that links to a page may have behind #, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (?:<a name=\"\w+\"></a>)?(.+)$", FENCE.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"<a name=\"(\w+)\">", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    """Here and on GitHub."""
    text = page.read_text("utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{page}: {target}"


def test_all_settings_are_listed() -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert set(TABLE.findall(page)) == set(TABLES)
    assert page == with_tables(page), "run python tools/settings_tables.py"
    named = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    for spec in ENGINES.values():
        taken = getattr(arguments, spec.arguments)
        assert {name for base in (*taken.__mro__, taken) for name in getattr(base, "__annotations__", {})} <= named
    assert set(arguments.DecodingArguments.__annotations__) | set(arguments.ModelArguments.__annotations__) <= named
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert not [row for row in rows if not row.rstrip("| ").split(" | ")[-1].strip()]  # each has a meaning


def test_links_out_of_the_docs_lead_to_the_repository() -> None:
    page = "[Tasks](tasks.md#add), [a test](../tests/test_x.py)"
    there = "https://example.org/blob/main/tests/test_x.py"
    assert with_links_of_site(page, "https://example.org") == f"[Tasks](tasks.md#add), [a test]({there})"
    assert with_links_of_site(page, None) == "[Tasks](tasks.md#add), a test"


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    """--strict: a broken link, a missing anchor and a page outside the navigation are errors."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "settings" / "index.html").read_text("utf-8")
    assert all(f"<code>{name}</code>" in settings for name in arguments.NativeArguments.__annotations__)
    assert "<table>" in (tmp_path / "tasks" / "index.html").read_text("utf-8")
    assert "Rita has 474 marbles" in (tmp_path / "api" / "index.html").read_text("utf-8")
