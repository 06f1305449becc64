"""Building blocks of the report: style sheet, escaping, tables, cards, pictures as data URIs."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

MAX_PICTURE_BYTES = 20_000_000

STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #e3e7ee; --tint: #f6f8fb; --accent: #2458a6; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 8px 0 12px; }
.soft, figcaption, .interval { color: var(--soft); font-size: 0.88rem; }
.interval { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px; margin: 24px 0; }
.card { background: var(--tint); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card .label { color: var(--soft); font-size: 0.85rem; line-height: 1.3; }
.card .value { font-size: 1.65rem; font-weight: 650; line-height: 1.35; }
.card .note { color: var(--soft); font-size: 0.82rem; line-height: 1.35; }
.notice { border-left: 4px solid #d18b00; background: #fff8e8; padding: 8px 14px; margin: 12px 0; }
.notice.good { border-color: #2b8a4b; background: #effaf2; }
.notice.bad { border-color: #c0392b; background: #fdf1ef; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 16px; font-size: 0.92rem; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: 0.82rem; border-bottom: 2px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number + td:not(.number), th.number + th:not(.number) { padding-left: 18px; }
table.explained td:first-child { min-width: 130px; font-weight: 600; }
table.explained td:last-child { color: var(--soft); }
figure { margin: 12px 0; }
img { max-width: 100%; height: auto; display: block; }
figure.framed img { border: 1px solid var(--line); border-radius: 8px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; }
.strip figure { margin: 0; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px;
  font: 0.84rem/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre.columns { columns: 2 340px; column-gap: 36px; }
footer { margin-top: 48px; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 560px) { main { padding: 20px 14px 40px; } h1 { font-size: 1.5rem; }
  .cards { grid-template-columns: 1fr 1fr; } .strip { grid-template-columns: 1fr 1fr; }
  table.explained tr { display: grid; grid-template-columns: 1.1fr 1fr 1fr; border-bottom: 1px solid var(--line); }
  table.explained :is(td, th) { border: 0; }
  table.explained th:last-child { display: none; }
  table.explained td:last-child { grid-column: 1 / -1; padding: 0 0 10px; font-size: 0.88rem; }
  table.explained .interval { white-space: normal; } }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; }
  figure, .card, tr, .notice { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole HTML document; ``body`` is HTML, ``title`` plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a titled section, or nothing where all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(text: str, style: str = "") -> str:
    """Return ``text`` as a paragraph, or nothing where it is empty."""
    mark = f' class="{style}"' if style else ""
    return f"<p{mark}>{escape(text)}</p>" if text else ""


def notice(text: str, tone: str = "") -> str:
    """Return ``text`` in a coloured box (``tone``: good, bad, or empty for a warning), or nothing."""
    return f'<div class="notice {tone}">{escape(text)}</div>' if text else ""


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Return headline numbers from (label, value, note)."""
    inner = "\n".join(
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in items
    )
    return f'<div class="cards">\n{inner}\n</div>' if inner else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), style: str = "") -> str:
    """Return a table of plain texts; the columns in ``numbers`` are set flush right.

    A line break in a cell starts a smaller, grey second line. The style "explained" is for tables whose
    last column is prose: on a phone it goes below its row.
    """

    def cell(tag: str, index: int, text: str) -> str:
        mark = ' class="number"' if index in numbers else ""
        first, *rest = escape(text).split("\n")
        small = "".join(f'<br><span class="interval">{line}</span>' for line in rest)
        return f"<{tag}{mark}>{first}{small}</{tag}>"

    def line(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(cell(tag, index, text) for index, text in enumerate(texts)) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    if not body:
        return ""
    mark = f' class="{style}"' if style else ""
    head = f"<thead>{line('th', header)}</thead>" if any(header) else ""
    return f'<div class="scroll"><table{mark}>{head}\n<tbody>\n{body}\n</tbody></table></div>'


def preformatted(text: str, style: str = "") -> str:
    """Return ``text`` in a fixed-width block, or nothing where it is empty."""
    mark = f' class="{style}"' if style else ""
    return f"<pre{mark}>{escape(text.strip())}</pre>" if text.strip() else ""


def figure(data: bytes | None, kind: str, alt: str, caption: str = "", framed: bool = False) -> str:
    """Return a picture embedded as a data URI (``kind``: png, svg+xml), or nothing without data."""
    if not data:
        return ""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    mark = ' class="framed"' if framed else ""
    return f'<figure{mark}><img src="{uri}" alt="{escape(alt)}">{below}</figure>'


def read_png(path: Path) -> bytes | None:
    """Return the bytes of a PNG that can be shown: there, of sensible size, complete; else None."""
    from PIL import Image

    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            return None
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return data
