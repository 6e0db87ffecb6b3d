"""A report as one HTML file: text, verdicts, tables and pictures, with nothing to load."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

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
  --good: #18794e; --fair: #8f5600; --bad: #b42318; --none: #5b6575; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ef; --muted: #9aa4b2; --page: #12151a; --card: #1b2027; --line: #323a46;
    --good: #57c795; --fair: #e5b04d; --bad: #ff8f82; --none: #9aa4b2; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 0 .75rem 0 0; font-size: 1.25rem; }
p { margin: .75rem 0; max-width: 46rem; }
section { margin: 1.5rem 0; padding: 1.25rem 1.5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; }
header p, figcaption, footer { color: var(--muted); }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 0; }
.badge { padding: .05rem .7rem; border: 1.5px solid; border-radius: 1rem; font-size: .85rem;
  font-weight: 600; }
.good { color: var(--good); } .fair { color: var(--fair); }
.bad { color: var(--bad); } .none { color: var(--none); }
figure { margin: 1.25rem 0 0; }
figcaption { margin-bottom: .35rem; font-size: .9rem; }
pre { margin: 0; padding: .75rem 1rem; overflow-x: auto; white-space: pre-wrap;
  background: var(--page); border-radius: .4rem;
  font: .8rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
img { display: block; max-width: 100%; height: auto; padding: .5rem; background: #fff;
  border-radius: .4rem; }
footer { font-size: .85rem; }
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


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Args:
        text: paragraphs, with an empty line between them.
        verdict: "good", "correctable", "unreliable" or "not assessed": a coloured badge.
        blocks: pairs of a caption and text to show as it is, such as tables.
        figures: pairs of a caption and a PNG file, which goes into the page.
    """

    title: str
    text: str = ""
    verdict: str = ""
    blocks: tuple[tuple[str, str], ...] = ()
    figures: tuple[tuple[str, Path], ...] = ()


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page that needs no other file."""
    page = PAGE.substitute(
        title=escape(title),
        lead=_paragraphs(lead),
        sections="\n".join(map(_section, sections)),
        version=escape(version("pvi")),
        date=date.today().isoformat(),
    )
    Path(path).write_text(page, encoding="utf-8")


def _section(section: Section) -> str:
    badge = f'<span class="badge {BADGES.get(section.verdict, "none")}">{escape(section.verdict)}'
    title = f"<h2>{escape(section.title)}</h2>{badge + '</span>' if section.verdict else ''}"
    parts = [f'<div class="title">{title}</div>', _paragraphs(section.text)]
    parts += [_figure(caption, f"<pre>{escape(text)}</pre>") for caption, text in section.blocks]
    parts += [_figure(caption, _image(caption, file)) for caption, file in section.figures]
    return "<section>" + "\n".join(filter(None, parts)) + "</section>"


def _figure(caption: str, content: str) -> str:
    heading = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{heading}{content}</figure>"


def _image(caption: str, file: Path) -> str:
    data = b64encode(Path(file).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'


def _paragraphs(text: str) -> str:
    return "\n".join(
        f"<p>{escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip()
    )
