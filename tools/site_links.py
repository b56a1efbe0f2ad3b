"""A hook of mkdocs (mkdocs.yml): links out of docs/ lead to the repository, or become text where there is none yet."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

OUT_OF_DOCS = re.compile(r"\[([^]]+)\]\(\.\./([^)\s]+)\)")


def with_links_of_site(markdown: str, repository: str | None) -> str:
    """A page with links that hold on the site; `repository` is the repository's address, None if there is none."""
    to = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1"
    return OUT_OF_DOCS.sub(to, markdown)


def address() -> str | None:
    """The repository's address in the package's metadata; None if there is none yet."""
    named = dict(entry.split(", ", 1) for entry in metadata("sdar-lm-eval").get_all("Project-URL") or [])
    found = named.get("Repository", "")
    return None if not found or ".invalid" in found else found.rstrip("/")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the site to the repository."""
    config.repo_url = address()
    return config


def on_page_markdown(markdown: str, *, config: MkDocsConfig, **_: object) -> str:
    """Change a page's links."""
    return with_links_of_site(markdown, config.repo_url)
