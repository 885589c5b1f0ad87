"""The rooms of spo_jax and their imports as one picture, docs/images/rooms.png.

    python benchmarks/rooms.py

Floors and words are those of CONTRIBUTING.md, imports those of the code, ``__init__.py`` left out.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from spo_jax.report.style import COLOURS, FAINT_INK, INK, figure_style, figure_to_png

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.png"
WIDTH, BOX, LINE, GAP = 9.2, 1.7, 0.145, 0.58
"""Inches: the picture, a box across, a line of words, and the room for arrows between floors."""

Boxes = dict[str, tuple[float, float, float]]
"""Room to the centre, the bottom and the height of its box."""


def block(title: str) -> list[str]:
    """The lines of the first fenced block below the heading ``title`` of CONTRIBUTING.md."""
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {title}\n")
    return re.search(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].splitlines()


def read_words() -> dict[str, str]:
    """A few words on each room, from the tree of the house: what stands before a semicolon."""
    lines = (line.split(maxsplit=1) for line in block("The house")[1:])
    words = {name.strip("/").removesuffix(".py"): text.split(";")[0] for name, text in lines}
    return {**words, "__main__": "python -m spo_jax"}


def read_imports() -> dict[str, set[str]]:
    """Each room and the rooms it imports from, imports inside functions too."""
    package = ROOT / "spo_jax"
    files = {p: p.relative_to(package).parts[0].removesuffix(".py") for p in package.rglob("*.py")}
    found: dict[str, set[str]] = {room: set() for room in files.values() if room != "__init__"}
    for path, room in files.items():
        for node in ast.walk(ast.parse(path.read_text())) if room in found else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                parts = [f"{start}{alias.name}".split(".") for alias in node.names]
                found[room] |= {p[1] for p in parts if p[0] == "spo_jax" and p[1] in found}
    return {room: targets - {room} for room, targets in found.items()}


def place(floors: list[list[str]], lines: dict[str, list[str]]) -> Boxes:
    """A box for each room, the first floor lowest."""
    boxes, bottom = {}, 0.1
    for rooms in floors:
        height = LINE * (max(len(lines[room]) for room in rooms) + 2.1)
        step = WIDTH / max(len(rooms), 4)
        for i, room in enumerate(rooms):
            boxes[room] = (WIDTH / 2 + step * (i - (len(rooms) - 1) / 2), bottom, height)
        bottom += height + GAP
    return boxes


def draw_imports(axes: Axes, floors: list[list[str]], boxes: Boxes) -> None:
    """Arrows to the next floor, faint lines further down, behind the boxes."""
    floor = {room: i for i, rooms in enumerate(floors) for room in rooms}
    pairs = [(room, target) for room, found in read_imports().items() for target in sorted(found)]
    for room, target in pairs:
        (x, y, _), (to, low, tall) = boxes[room], boxes[target]
        shift = 0.4 * BOX * (to - x) / WIDTH
        look = {"arrowstyle": "-|>", "color": COLOURS[0], "linewidth": 1.1, "zorder": 2}
        if floor[room] - floor[target] > 1:
            look = {"arrowstyle": "-", "color": FAINT_INK, "linewidth": 0.8, "alpha": 0.3}
        ends = (x + shift, y), (to - shift, low + tall)
        axes.add_patch(FancyArrowPatch(*ends, mutation_scale=10, shrinkA=0, shrinkB=0, **look))


def draw_picture() -> bytes:
    """The PNG file."""
    floors, words = [line.split() for line in block("One direction")], read_words()
    lines = {r: textwrap.wrap(text, 25, break_on_hyphens=False) for r, text in words.items()}
    boxes = place(floors, lines)
    height = max(bottom + tall for _, bottom, tall in boxes.values()) + 0.55
    with figure_style():
        figure = Figure(figsize=(WIDTH, height), dpi=120)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        axes.axis("off")
        draw_imports(axes, floors, boxes)
        text = {"va": "top", "color": INK, "zorder": 4}
        title = "The rooms of spo_jax: a line leads down to what is imported"
        axes.text(0.1, height - 0.1, title, weight="bold", size=11, **text)
        axes.text(0.1, height - 0.32, "blue: from the next floor; grey: from further down", **text)
        for room, (x, y, tall) in boxes.items():
            look = {"facecolor": "#f4f6f9", "edgecolor": INK, "zorder": 3}
            style = "round,pad=0,rounding_size=0.06"
            axes.add_patch(FancyBboxPatch((x - BOX / 2, y), BOX, tall, boxstyle=style, **look))
            axes.text(x, y + tall - 0.07, room, weight="bold", size=10, ha="center", **text)
            words_of_room = "\n".join(lines[room])
            axes.text(x, y + tall - 0.27, words_of_room, size=7.8, ha="center", **text)
        return figure_to_png(figure)


if __name__ == "__main__":
    PICTURE.write_bytes(draw_picture())
    print(PICTURE.relative_to(ROOT))
