"""Pages of one HTML file that load nothing. All text from outside is escaped, and only the page's own script runs."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from itertools import chain

from maskformer.untrusted import escaped

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f4f4f5; --text: #18181b; --faint: #5b5b63; --line: #d4d4d8;
  --control: #85858f; --accent: #1d4fa3; --warning: #a83c00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131316; --card: #202024; --text: #ececf0; --faint: #a3a3ad; --line: #3a3a42; --control: #777783;
    --accent: #9dbcf7; --warning: #fbbf24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1700px; padding: 1rem; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: .1rem .8rem; margin: 0; font-size: .9rem; }
dt { color: var(--faint); }
dd { margin: 0; }
select, input, button { font: inherit; max-width: 100%; }
a { color: inherit; }
[hidden] { display: none !important; }
"""
"""The common style. A page's own style comes after it."""


def document(title: str, body: Iterable[str], *, style: str, script: str, after: Iterable[str] = ()) -> bytes:
    """Return the HTML of a page in UTF-8.

    Args:
        title: of the window, as text.
        body: lines of HTML.
        style: what to add to `STYLE`.
        script: the only script that may run.
        after: lines of HTML that the script does not wait for.
    """
    style = STYLE + style
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    head = (
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{text(title)}</title>",
        f"<style>{style}</style>",
    )
    lines = chain(head, body, (f"<script>{script}</script>",), after, ("</html>", ""))
    return b"\n".join(line.encode() for line in lines)  # as one string it would take up to four times the memory


def fact_list(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a list of names and values."""
    return ["<dl>", *(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs), "</dl>"]


def text(value: object) -> str:
    """Return a value as text in HTML: markup escaped, and what is not printable as its code."""
    return html.escape(escaped(value))


def jpeg_address(content: bytes) -> str:
    """Return the data address of a JPEG."""
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
