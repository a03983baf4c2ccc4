"""Text in Markdown."""

import re


def escaped(text: str) -> str:
    """Text, on one line, that Markdown, and HTML in it, take for nothing but text.

    >>> escaped("a_b <i> &lt;")
    'a\\\\_b \\\\<i\\\\> &amp;lt;'
    """
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
