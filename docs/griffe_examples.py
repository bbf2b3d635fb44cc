"""Shows examples of docstrings as code: Markdown takes `>>>` for a quote."""

import re
from typing import Any

import griffe

# Lines from the first `>>>` to the next empty one.
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts the examples of each docstring into a block of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match) -> str:
    fence = match["indent"] + "```"
    return f"{fence}pycon\n{match[0]}\n{fence}"
