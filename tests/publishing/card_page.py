"""A model card as the hub shows it: its Markdown in a page, for looking at and for tests.

``python tests/publishing/card_page.py FOLDER OUT.png [WIDTH]`` takes the picture of a folder's card. The hub
renders GitHub's Markdown and lets no script through; the front matter becomes tags above the text.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
from browser import Browser, chromium

STYLE = """
body { font: 16px/1.6 "Source Sans Pro", "Segoe UI", sans-serif; color: #374151; max-width: 46rem;
       margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { color: #111827; line-height: 1.3; margin: 1.6em 0 .6em; }
h2 { border-bottom: 1px solid #e5e7eb; padding-bottom: .2em; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; margin: 1em 0; }
th, td { border: 1px solid #e5e7eb; padding: .3em .7em; }
th { background: #f9fafb; text-align: left; }
img { max-width: 100%; margin: .5em 0; display: inline-block; }
pre { background: #0d1117; color: #e6edf3; padding: 1em; overflow-x: auto; border-radius: .5em; }
code { font: 13px/1.5 monospace; } :not(pre) > code { background: #f3f4f6; padding: .1em .3em; }
.tags span { border: 1px solid #e5e7eb; border-radius: .5em; padding: .15em .6em; margin: .2em;
             display: inline-block; font-size: 13px; }
"""


def card_html(folder: Path) -> str:
    """The whole page; images are looked for in the folder."""
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    renderer = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    text = re.sub(r"<!-- /?qwenq:\w+ -->\n?", "", card.text)  # comments are not shown
    data = card.data.to_dict()
    tags = [data.get("pipeline_tag"), data.get("library_name"), data.get("license"), *data.get("tags", [])]
    listed = "".join(f"<span>{html.escape(str(tag))}</span>" for tag in tags if tag)
    base = folder.resolve().as_uri()
    return (
        f'<!doctype html><meta charset="utf-8"><base href="{base}/"><style>{STYLE}</style>'
        f'<p class="tags">{listed}</p>{renderer.render(text)}'
    )


def picture(folder: Path, out: Path, width: int = 900) -> None:
    """The whole card as a PNG."""
    program = chromium()
    assert program, "needs chromium"
    with tempfile.TemporaryDirectory() as profile:
        page = Path(profile) / "card.html"
        page.write_text(card_html(folder), encoding="utf-8")
        browser = Browser(program, Path(profile))
        browser.look(width)
        browser.open(page)
        browser.screenshot(out)
        browser.close()


if __name__ == "__main__":
    folder, out, *width = sys.argv[1:]
    picture(Path(folder), Path(out), *map(int, width))
