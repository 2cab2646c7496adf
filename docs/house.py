"""Draw docs/house.svg from the imports in the code. It shows the rooms of hast_jax (groups of modules), and who imports whom.

    python docs/house.py

An arrow that other arrows imply is left out. An import that goes up should not exist, and is drawn dashed and red.
"""

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "house.svg"
WIDTH, HEIGHT, TOP, ROW, BOX, SPREAD = 960, 1030, 20, 116, 62, 64
COLORS = {"down": "#5b6b80", "up": "#c0392b"}
HEAD = (
    '<marker id="{}" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">'
    '<path d="M0,0 L8,4 L0,8" fill="{}"/></marker>'
)

Edge = tuple[str, str]  # a room, and a room that it imports


class Room(NamedTuple):
    """A box of the picture. row: counted from the top. left, right: its edges. words: its second line.

    modules: those in the folder hast_jax; empty if the room is a folder in hast_jax.
    """

    row: int
    left: int
    right: int
    words: str
    modules: tuple[str, ...] = ()


ROOMS = {
    "commands": Room(
        0,
        20,
        940,
        "flags in, library call, table out",
        ("benchmark", "cli", "evaluate", "export", "main", "operations", "pretrain", "report", "reproduce", "results"),
    ),
    "paper": Room(1, 20, 310, "the supplement's experiments"),
    "library": Room(
        2,
        20,
        940,
        "quantize, each stage as a function",
        ("from_config", "given", "library", "pipeline", "record"),
    ),
    "stages": Room(3, 20, 470, "synthesize, calibrate, finetune, evaluate"),
    "deliver": Room(3, 495, 940, "exports, progress bars, tables, pictures"),
    "student": Room(4, 495, 940, "the quantized network, saved and loaded", ("student",)),
    "runs": Room(5, 20, 940, "folders, checkpoints, devices, loop, progress"),
    "config": Room(6, 20, 940, "every field, described once", ("config", "cross_checks", "fields")),
    "networks": Room(7, 20, 625, "any Linen or nnx module, weights", ("models", "networks")),
    "data": Room(7, 650, 940, "real images, for evaluation"),
    "method": Room(8, 20, 625, "the paper, as functions of arrays"),
}
COMMON = ("__init__", "errors", "kinds", "paths")  # in no room: modules for everyone, and the list of public names


def imports() -> set[Edge]:
    """Every (room, other room that it imports). Raises ValueError for a module without a room."""
    files = {_module(path): path for path in sorted((ROOT / "hast_jax").rglob("*.py"))}
    found = set()
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hast_jax":
                names = [name.name for name in node.names if name.name != "__version__"]
                inside = [f"{node.module}.{name}".partition(".")[2] for name in names]
                package = str(node.module).partition(".")[2]
                found |= {(_room(module), _room(name if name in files else package or name)) for name in inside}
    return {(a, b) for a, b in found if a and b and a != b}


def shown(edges: set[Edge]) -> tuple[list[Edge], list[Edge]]:
    """The arrows down that no other arrows imply, and the arrows that go up or sideways."""
    down = {(a, b) for a, b in edges if ROOMS[a].row < ROOMS[b].row}
    below = {room: _below(room, down) for room in ROOMS}
    implied = {(a, c) for a, b in down for c in below[b] if (a, c) in down}
    return sorted(down - implied), sorted(edges - down)


def draw() -> str:
    """The picture as the text of an SVG file. It has its own background, so that it can be read on any page."""
    down, up = shown(imports())
    boxes = [line for name, room in ROOMS.items() for line in _box(name, room)]
    arrows = [_arrow(edge, [*down, *up], "down") for edge in down] + [_arrow(edge, [*down, *up], "up") for edge in up]
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#f4f6f9"/>'
    heads = "".join(HEAD.format(name, color) for name, color in COLORS.items())
    title = "<title>The rooms of hast_jax and who imports whom</title>"
    return "\n".join([f'{frame} text-anchor="middle">', title, heads, background, *arrows, *boxes, "</svg>"]) + "\n"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "hast_jax").with_suffix("").parts).removesuffix(".__init__")


def _room(module: str) -> str | None:
    top = module.split(".")[0]
    if top in COMMON:
        return None
    if top in ROOMS and not ROOMS[top].modules:
        return top
    found = next((name for name, room in ROOMS.items() if top in room.modules), None)
    if found is None:
        raise ValueError(f"hast_jax.{module} has no room: give it one in docs/house.py.")
    return found


def _below(room: str, down: set[Edge]) -> set[str]:
    direct = {b for a, b in down if a == room}
    return direct.union(*(_below(b, down) for b in direct))


def _arrow(edge: Edge, edges: list[Edge], kind: str) -> str:
    start, end = (ROOMS[room] for room in edge)
    x0, x1 = (_place(room, edge, edges) for room in edge)
    if end.right - end.left > 2 * (start.right - start.left):  # between a narrow and a wide box the arrow is vertical
        x1 = x0
    if start.right - start.left > 2 * (end.right - end.left):
        x0 = x1
    is_down = start.row < end.row
    y0, y1 = TOP + ROW * start.row + (BOX if is_down else 0), TOP + ROW * end.row + (0 if is_down else BOX)
    dashes = "" if kind == "down" else ' stroke-dasharray="6 4"'
    style = f'stroke="{COLORS[kind]}" stroke-width="1.6" marker-end="url(#{kind})"{dashes}'
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" {style}/>'


def _place(room: str, edge: Edge, edges: list[Edge]) -> int:
    """The x coordinate where an arrow meets a box, beside the other arrows on the same side of the box."""

    def other(e):
        return ROOMS[e[e[0] == room]]

    def side(e):
        return other(e).row > ROOMS[room].row

    beside = sorted((e for e in edges if room in e and side(e) == side(edge)), key=lambda e: (_middle(other(e)), e))
    return _middle(ROOMS[room]) + round(SPREAD * (beside.index(edge) - (len(beside) - 1) / 2))


def _middle(room: Room) -> int:
    return (room.left + room.right) // 2


def _box(name: str, room: Room) -> list[str]:
    y, middle, width = TOP + ROW * room.row, _middle(room), room.right - room.left
    return [
        f'<rect x="{room.left}" y="{y}" width="{width}" height="{BOX}" rx="8" fill="#ffffff" stroke="#33465f"/>',
        f'<text x="{middle}" y="{y + 27}" font-size="18" font-weight="bold" fill="#16263c">{name}</text>',
        f'<text x="{middle}" y="{y + 49}" font-size="13.5" fill="#33465f">{room.words}</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(draw())
