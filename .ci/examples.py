"""Writes the Python examples of the documentation, a file per page, into a new folder, and prints the folder's name: for mypy --strict."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/api.md", "docs/text.md")
RECIPES = tuple(
    f"docs/{page}.md"
    for page in ("bring-your-model", "models-vision", "models-language", "models-own", "own-loop", "callbacks")
)


def main() -> None:
    """Joins the blocks of each page, which are one program; on the pages of recipes each block is one, and begins with its file's name."""
    folder = Path(tempfile.mkdtemp(prefix="delock-examples-"))
    for page in PAGES:
        (folder / f"{Path(page).stem.lower()}.py").write_text("\n\n".join(blocks(page)), encoding="utf-8")
    for page in RECIPES:
        for block in blocks(page):
            (folder / block.split('"""')[1]).write_text(block, encoding="utf-8")
    print(folder)


def blocks(page: str) -> list[str]:
    """Returns the Python code on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


if __name__ == "__main__":
    main()
