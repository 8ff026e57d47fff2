"""One HTML file that shows tables and pictures without a server or anything from elsewhere."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.tables import Table

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --faint: #5b6570; --line: #d5dae0;
  --band: #f3f5f8; --link: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ed; --back: #14181d; --faint: #9aa5b1; --line: #39424d;
  --band: #1e242b; --link: #7db4f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
a { color: var(--link); } nav a { margin-right: 1rem; }
.wide { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.words, td.words { text-align: left; white-space: normal; min-width: 9rem; }
td:first-child { position: sticky; left: 0; background: var(--back); }
thead th { border-bottom: 2px solid var(--faint); vertical-align: bottom; white-space: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody.published, tbody.published td { color: var(--faint); font-style: italic; background: var(--band); }
tbody.published th { border-top: 2px solid var(--faint); text-align: left; }
tbody.published th span { position: sticky; left: .7rem; display: inline-block; max-width: calc(100vw - 4rem); }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; min-width: min(40rem, 175%); height: auto; background: #ffffff; }
figcaption { color: var(--faint); }
"""

_SORT = """
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex].textContent, number = row => parseFloat(key(row));
  const order = (a, b) => {
    const text = isNaN(number(a)) - isNaN(number(b));  // what is no number stays below
    if (text || isNaN(number(a))) return text || (up ? 1 : -1) * key(a).localeCompare(key(b));
    return (up ? 1 : -1) * (number(a) - number(b));
  };
  body.append(...[...body.rows].sort(order));
});
"""


@dataclass(frozen=True)
class Picture:
    """A PNG file, what it says to who cannot see it, and what stands below it."""

    path: Path
    description: str
    caption: str


@dataclass
class Section:
    """A heading with what stands below it: paragraphs, tables and pictures."""

    heading: str
    content: list[str | Table | Picture] = field(default_factory=list)


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page: text escaped, style, pictures and the few lines that sort tables inside it.

    It asks for nothing from elsewhere, and its policy forbids it. Raises OSError for a picture that is not there.
    """
    links = " ".join(f'<a href="#section{i}">{html.escape(s.heading)}</a>' for i, s in enumerate(sections))
    blocks = [
        f'<section id="section{i}"><h2>{html.escape(s.heading)}</h2>\n{"".join(map(_block, s.content))}</section>'
        for i, s in enumerate(sections)
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav aria-label="sections">{links}</nav>
{"".join(blocks)}
<script>{_SORT}</script>
</body>
</html>
"""


def _block(content: str | Table | Picture) -> str:
    if isinstance(content, Table):
        return _table(content)
    if isinstance(content, Picture):
        return _picture(content)
    return f"<p>{html.escape(content)}</p>\n"


def _table(table: Table) -> str:
    of_words = [any(row[i][:1].isalpha() for row in table.rows) for i in range(len(table.header))]
    columns = ['class="words"' if words or i == 0 else "" for i, words in enumerate(of_words)]
    head = "".join(
        f'<th scope="col" {column}><button type="button">{html.escape(text)}</button></th>'
        for column, text in zip(columns, table.header, strict=True)
    )
    body = f"<tbody>{_rows(table.rows, columns)}</tbody>"
    if table.published:
        heading = f'<tr><th colspan="{len(table.header)}"><span>{html.escape(table.published_heading)}</span></th></tr>'
        body += f'<tbody class="published">{heading}{_rows(table.published, columns)}</tbody>'
    caption = html.escape(table.caption)
    # What is scrolled must be reached by the keyboard too, and the caption must not scroll with it
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><thead><tr>{head}</tr></thead>{body}</table></div></figure>\n"
    )


def _rows(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> str:
    cells = ((f"<td {c}>{html.escape(t)}</td>" for c, t in zip(columns, row, strict=True)) for row in rows)
    return "".join(f"<tr>{''.join(row)}</tr>" for row in cells)


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure><div class="wide"><img alt="{html.escape(picture.description)}" src="data:image/png;base64,{data}">'
        f"</div><figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
    )
