"""Draw what a command shows in a terminal of 80 columns, as an SVG: a real run, recorded by tmux.

    python benchmarks/terminal_picture.py docs/pictures/demo.svg qwenq run demo

The command runs in an empty folder, and its exit code has to be 0. What a terminal shows at the end is
drawn: a progress bar that went away is not. Of many lines about layers the first and the last are kept.
"""

from __future__ import annotations

import argparse
import io
import shlex
import subprocess
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 80, 50
SERVER = "qwenq-picture"
"""tmux's server of this script: no other session is touched."""
KEPT = 2
"""Lines about layers on either side of those that are left out."""
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""
"""As rich's own, but without the fonts that it fetches from the network."""


def recorded(command: str, folder: Path) -> str:
    """Return the screen and all that scrolled off it, with colours, once a command has ended.

    Raises:
        SystemExit: the command failed.
    """
    tmux = ["tmux", "-L", SERVER, "-f", "/dev/null"]
    code = folder.parent / "code"
    script = f"{command}; echo $? > {shlex.quote(str(code))}; tmux -L {SERVER} wait-for -S ended; sleep 60"
    size = ["-x", str(COLUMNS), "-y", str(ROWS)]
    history = ["start-server", ";", "set-option", "-g", "history-limit", "10000", ";"]
    start = ["new-session", "-d", *size, "-c", str(folder), script]
    subprocess.run([*tmux, *history, *start], check=True)
    subprocess.run([*tmux, "wait-for", "ended"], check=True)
    shown = subprocess.run([*tmux, "capture-pane", "-e", "-p", "-S", "-"], check=True, capture_output=True)
    subprocess.run([*tmux, "kill-server"], check=False)
    if int(code.read_text()) != 0:
        raise SystemExit(f"{command} ended with exit code {code.read_text().strip()}")
    return shown.stdout.decode().rstrip()


def shortened(screen: str) -> str:
    """Return the screen with only the first and the last of many lines about layers."""
    lines = []
    for is_layer, found in groupby(screen.splitlines(), lambda line: line.startswith("  layer ")):
        run = list(found)
        lines += [*run[:KEPT], "  …", *run[-KEPT:]] if is_layer and len(run) > 2 * KEPT + 1 else run
    return "\n".join(lines)


def drawn(screen: str, title: str) -> str:
    """Return the screen as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen), soft_wrap=True)
    return console.export_svg(title=title, theme=MONOKAI, code_format=SVG, unique_id="terminal")


def main() -> None:
    """Run the command and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    command = shlex.join(asked.command)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "empty")
        folder.mkdir()
        screen = recorded(command, folder)
    asked.picture.write_text(drawn(shortened(f"$ {command}\n{screen}"), command), encoding="utf-8")


if __name__ == "__main__":
    main()
