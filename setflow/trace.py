"""The trace of one answer as a picture: a line for each forward, tokens in the colour of the forward that decided them.

Read it downwards: what is decided stays, what is not yet is a dot.
"""

import io
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from setflow.text import COLOURS, MASK, visible

# For the picture, in which they have a width.
BREAKS = str.maketrans(
    {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", "\r": "\\r"}
)
# As rich's own template, without fonts from elsewhere.
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>
.{unique_id}-matrix, .{unique_id}-title {{ font-family: monospace; font-size: {char_height}px }}
{styles}
</style>
<defs>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def picture_of(piece: str) -> str:
    """The text of a token as it stands in a picture."""
    return visible(piece).translate(BREAKS)


def trace_lines(pieces: Sequence[str], trace: Sequence[int], width: int) -> Iterator[Text]:
    """Lines of the picture, at most ``width`` characters wide.

    pieces: the text of each token. trace: the forward (1, 2, ...) that decided each token. A longer answer is cut into
    parts, one below the other; each has the forwards that decided something in it.
    """
    gutter = len(str(max(trace, default=0))) + 2
    for part in parts(map(picture_of, pieces), width - gutter):
        for forward in sorted({trace[i] for i, _ in part}):
            line = Text(f"{forward:>{gutter - 2}}  ", style="dim")
            for i, piece in part:
                if trace[i] > forward:
                    line.append(MASK * len(piece), style="dim")
                else:
                    colour = COLOURS[trace[i] % len(COLOURS)]
                    line.append(piece, style=f"bold {colour}" if trace[i] == forward else colour)
            yield line
        yield Text()


def parts(pieces: Iterable[str], width: int) -> Iterator[list[tuple[int, str]]]:
    """Runs of (number, piece), none longer than ``width``; a piece that alone is longer is cut."""
    part, room = [], width
    for i, piece in enumerate(pieces):
        piece = piece[:width]
        if len(piece) > room:
            yield part
            part, room = [], width
        part.append((i, piece))
        room -= len(piece)
    if part:
        yield part


def trace_svg(title: str, lines: Iterable[Text], width: int) -> str:
    """The lines as an SVG picture under ``title``, with no font or image from elsewhere."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in lines:
        console.print(line)
    return console.export_svg(title=visible(title), code_format=SVG, unique_id="trace")
