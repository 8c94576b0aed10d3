"""Writes the Python examples of the documentation, a file per page, into a new folder, and prints the folder's name: for mypy --strict."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/api.md", "docs/text.md")


def main() -> None:
    """Joins the blocks of each page, which are one program."""
    folder = Path(tempfile.mkdtemp(prefix="delock-examples-"))
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        (folder / f"{Path(page).stem.lower()}.py").write_text("\n\n".join(blocks), encoding="utf-8")
    print(folder)


if __name__ == "__main__":
    main()
