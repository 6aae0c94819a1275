"""Puts the generated tables into the README, each between its two comments.

    python scripts/update_readme.py [--check]

``<!-- table: FILE -->`` … ``<!-- end -->`` holds FILE, a path from the repository's root. With
``--check`` nothing is written, and the exit status is 1 where the README is not up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """The README with every table as its file has it now."""

    def fill(match: re.Match[str]) -> str:
        content = (ROOT / match[2]).read_text().strip()
        if not match[2].endswith(".md"):
            content = f"```\n{content}\n```"
        return f"{match[1]}{content}\n{match[3]}"

    return TABLE.sub(fill, text)


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = updated(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
