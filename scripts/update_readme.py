"""Puts the generated tables into the READMEs, each between its two comments.

    python scripts/update_readme.py [--check]

``<!-- table: FILE -->`` … ``<!-- end -->`` holds FILE, a path from the repository's root;
``<!-- table: FILE NAME -->`` of a Markdown file only the part whose headline begins ``**NAME**``.
With ``--check`` nothing is written, and the exit status is 1 where one is not up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "results/README.md")
TABLE = re.compile(r"(<!-- table: (\S+)(?: (\w[\w ]*))? -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """The text with every table as its file has it now.

    Raises:
        ValueError: If a file has no part of a name that is asked for.
    """

    def fill(match: re.Match[str]) -> str:
        content = (ROOT / match[2]).read_text().strip()
        if match[3]:
            content = _part(content, match[3], match[2])
        elif not match[2].endswith(".md"):
            content = f"```\n{content}\n```"
        return f"{match[1]}{content}\n{match[4]}"

    return TABLE.sub(fill, text)


def _part(content: str, name: str, file: str) -> str:
    parts = re.split(r"^(?=\*\*)", content, flags=re.MULTILINE)
    found = [part.strip() for part in parts if part.startswith(f"**{name}**")]
    if len(found) != 1:
        raise ValueError(f"{file}: expected one part named {name!r}, found {len(found)}")
    return found[0]


def main() -> int:
    stale = False
    for name in READMES:
        file = ROOT / name
        old = file.read_text()
        new = updated(old)
        stale |= old != new
        if "--check" not in sys.argv[1:]:
            file.write_text(new)
    return int(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
