"""The documentation's pages, and the blocks in them.

```console     commands behind "$ ", and lines of their output; every command is run
```sh          commands that need a GPU, a network or much time; their words are checked
```python      without a title: run; with a title: the content of that file
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "sdar_lm_eval" / "tasks" / "README.md")
FENCE = re.compile(r"^ *```(\w*)(?: title=\"(.*?)\")?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`((?:modal run|sdar_lm_eval \w+|lm_eval \w+) [^`…]+)`(?!`)")
ASSIGNMENT = re.compile(r"\w+='[^']*'$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page's file.
        language: the word behind the fence.
        title: the file that the block is the content of; "" if none.
        text: the lines between the fences.
    """

    page: Path
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands, each in one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip()]

    @property
    def shown(self) -> list[str]:
        """The lines of output of a console block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("$ ")]


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages, in order."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        found += [Block(page, f[1], f[2] or "", f[3]) for f in FENCE.finditer(text) if f[1] in languages]
    return found


def commands() -> list[tuple[Path, str]]:
    """(page, command) of each command in a block or a span."""
    found = [(block.page, command) for block in blocks("console", "sh") for command in block.commands]
    for page in PAGES:
        found += [(page, span) for span in SPAN.findall(FENCE.sub("", page.read_text("utf-8")))]
    return [(page, command) for page, command in found if not ASSIGNMENT.match(command)]
