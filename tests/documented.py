"""Code of the documentation, as it stands there."""

import re
from pathlib import Path


DOCS = Path(__file__).parents[1] / "docs"


def documented(page, name):
    """What is called `name` in the Python blocks of a page."""
    found = {"__name__": "documented"}
    for block in re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        if name in block:
            exec(compile(block, page, "exec"), found)
    return found[name]
