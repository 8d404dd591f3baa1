"""Names and lines inside Markdown: what a user or a model is called may hold anything."""

from __future__ import annotations

import html
import re


def markdown(text: str) -> str:
    r"""Text as Markdown that shows it as it is, on one line, HTML included.

    >>> markdown("a_b <img src=x> | [c](d)")
    'a\\_b &lt;img src=x&gt; \\| \\[c\\](d)'
    """
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in the text.

    >>> print(fenced("ls", "bash"))
    ```bash
    ls
    ```
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
