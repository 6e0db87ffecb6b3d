"""A page as one HTML file: verdicts, tables and pictures, with nothing to load."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any, Protocol

BADGES = {"good": "good", "correctable": "fair", "unreliable": "bad"}  # verdict -> CSS class

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --text: #1d2430; --muted: #5b6575; --page: #f5f6f8; --card: #fff; --line: #dfe3e9;
  --good: #18794e; --fair: #8f5600; --bad: #b42318; --none: #5b6575; --bar: #a9c3e8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e9ef; --muted: #9aa4b2; --page: #12151a; --card: #1b2027; --line: #323a46;
    --good: #57c795; --fair: #e5b04d; --bad: #ff8f82; --none: #9aa4b2; --bar: #3d5f8f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 0 .75rem 0 0; font-size: 1.25rem; }
p, ul { margin: .75rem 0; max-width: 46rem; }
ul { padding-left: 1.25rem; }
section { margin: 1.5rem 0; padding: 1.25rem 1.5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
header p, figcaption, footer, dt { color: var(--muted); }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 0; }
.badge { padding: .05rem .7rem; border: 1.5px solid; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; }
.good { color: var(--good); } .fair { color: var(--fair); }
.bad { color: var(--bad); } .none { color: var(--none); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1rem;
  margin: .75rem 0; }
dt { font-size: .85rem; } dd { margin: 0; font-weight: 600; }
dd small { display: block; color: var(--muted); font-weight: 400; }
figure { margin: 1.25rem 0 0; }
figcaption { margin-bottom: .35rem; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
tbody th { position: sticky; left: 0; background: var(--card); }
td.wide { white-space: normal; min-width: 12rem; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
.bar { display: block; min-width: 7rem; }
.bar span { display: block; height: .8rem; margin-top: .15rem; background: var(--bar);
  border-radius: .2rem; }
pre { margin: 0; padding: .75rem 1rem; overflow-x: auto; background: var(--page);
  border-radius: .4rem; font: .8rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
img { display: block; max-width: 100%; height: auto; padding: .5rem; background: #fff;
  border-radius: .4rem; }
footer { font-size: .85rem; }
@media (max-width: 40rem) { body { padding: 1rem .5rem; } section { padding: 1rem; }
  h1 { font-size: 1.5rem; } }
@media print { body { max-width: none; padding: 0; background: none; font-size: .85rem; }
  section { border: 0; padding: 0; } figure, tr, dl { break-inside: avoid; }
  .scroll, pre { overflow: visible; } table { font-size: .65rem; } pre { white-space: pre-wrap; }
  th, td { white-space: normal; } }
</style>
</head>
<body>
<header><h1>$title</h1>
$lead
</header>
<main>
$sections
</main>
<footer>pvi $version, $date</footer>
</body>
</html>
""")


class Part(Protocol):
    """Something that stands in a section."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class Items:
    """A list with a point before each line."""

    lines: Sequence[str]

    def html(self) -> str:
        return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in self.lines)}</ul>"


@dataclass(frozen=True)
class Numbers:
    """Key numbers in a grid: label, value and a remark of a few words or none."""

    rows: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        cells = (
            f"<div><dt>{escape(label)}</dt><dd>{escape(value)}"
            f"{f'<small>{escape(remark)}</small>' if remark else ''}</dd></div>"
            for label, value, remark in self.rows
        )
        return f"<dl>{''.join(cells)}</dl>"


@dataclass(frozen=True)
class Bar:
    """A cell with a bar, from 0 to 1."""

    share: float

    def html(self) -> str:
        width = 100 * min(max(self.share, 0.0), 1.0)
        return f'<span class="bar"><span style="width: {width:.1f}%"></span></span>'


@dataclass(frozen=True)
class Table:
    """Rows under a header: numbers to the right, words to the left; wide ones scroll.

    Args:
        header: names of the columns.
        rows: of strings, numbers (4 digits are shown; NaN is left empty) and `Bar`.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def html(self) -> str:
        numeric = [any(map(_is_number, column)) for column in zip(*self.rows, strict=True)]
        head = "".join(
            f'<th scope="col"{_kind(number)}>{escape(name)}</th>'
            for name, number in zip(self.header, numeric, strict=False)
        )
        lines = "\n".join(f"<tr>{''.join(self._cells(row, numeric))}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>"
        return _figure(self.caption, f'<div class="scroll" tabindex="0">{table}</div>')

    def _cells(self, row: Sequence[Any], numeric: Sequence[bool]) -> Iterator[str]:
        for i, (value, number) in enumerate(zip(row, numeric, strict=True)):
            text = value.html() if isinstance(value, Bar) else escape(_text(value))
            wide = ' class="wide"' if len(text) > 60 and not isinstance(value, Bar) else ""
            tag = 'th scope="row"' if i == 0 else "td"
            yield f"<{tag}{_kind(number) or wide}>{text}</{tag[:2]}>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _kind(number: bool) -> str:
    return ' class="number"' if number else ""


def _text(value: Any) -> str:
    """A cell as text: integers in full, other numbers with four digits."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Code:
    """Text to show as it is."""

    text: str
    caption: str = ""

    def html(self) -> str:
        return _figure(self.caption, f'<pre tabindex="0">{escape(self.text)}</pre>')


@dataclass(frozen=True)
class Picture:
    """A PNG, which goes into the page.

    Args:
        name: of a file, where the picture is kept as well.
        alt: what can be seen; by default the caption.
    """

    name: str
    png: bytes
    caption: str
    alt: str = ""

    @classmethod
    def of(cls, figure: Any, name: str, caption: str, alt: str = "") -> "Picture":
        """A matplotlib figure as PNG."""
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        return cls(name, buffer.getvalue(), caption, alt)

    def save(self, folder: Path) -> None:
        """Write the PNG."""
        Path(folder, self.name).write_bytes(self.png)

    def html(self) -> str:
        data, alt = b64encode(self.png).decode(), escape(self.alt or self.caption)
        image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
        return _figure(self.caption, image)


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Args:
        parts: strings are paragraphs, with an empty line between them.
        verdict: "good", "correctable", "unreliable" or "not assessed": a coloured badge.
    """

    title: str
    parts: Sequence[Part | str] = ()
    verdict: str = ""

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    def html(self) -> str:
        kind = BADGES.get(self.verdict, "none")
        badge = f'<span class="badge {kind}">{escape(self.verdict)}</span>' if self.verdict else ""
        title = f'<div class="title"><h2>{escape(self.title)}</h2>{badge}</div>'
        parts = (_paragraphs(p) if isinstance(p, str) else p.html() for p in self.parts)
        return "<section>" + "\n".join(filter(None, [title, *parts])) + "</section>"


def write_page(path: Any, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page that needs no other file."""
    page = PAGE.substitute(
        title=escape(title),
        lead=_paragraphs(lead),
        sections="\n".join(section.html() for section in sections),
        version=escape(installed("pvi")),
        date=date.today().isoformat(),
    )
    Path(path).write_text(page, encoding="utf-8")


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _figure(caption: str, content: str) -> str:
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{heading}{content}</figure>"


def _paragraphs(text: str) -> str:
    return "\n".join(
        f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip()
    )
