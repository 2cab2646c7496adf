"""Variables as trees: Flax's own, in Python or in a msgpack file, and Orbax checkpoints, which are folders.

A tree is `{"params": ..., "batch_stats": ...}`. These two may also lie beside other entries, up to `DEPTH` levels down, as in a
TrainState. All other entries are ignored. A tree without `params` is taken for the params themselves.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from hast_jax.errors import UserError
from hast_jax.networks.packed import check_size

COLLECTIONS = ("params", "batch_stats")
OPTIMIZER = "opt_state"  # of a TrainState: its moments are shaped like params
DEPTH = 3  # an item of a checkpoint, a name in the item, and the name of a TrainState's params
TREE = "_METADATA"  # the file that every Orbax folder of arrays has
UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders whose writer was stopped

Place = tuple[str, ...]


def flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """State dict of a tree of arrays: {"params/conv/kernel": array}, in the layout and the dtypes of the tree.

    Raises UserError if the tree holds the variables of more than one network.
    """
    place = _place(tree)
    return _named({"params": tree} if place is None else _variables(_at(tree, place)))


def read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """State dict of a file that `flax.serialization` wrote, as from `flat`. Raises ValueError if it holds no tree."""
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds one {type(tree).__name__} instead of a tree of arrays")
    return flat(tree)


def read_orbax(folder: Path) -> dict[str, np.ndarray]:
    """State dict of an Orbax checkpoint, as from `flat`. In a folder of several steps, the newest one is read.

    Raises UserError if the folder holds no checkpoint or more than one network. Raises ValueError if the arrays would take far
    more memory than the files take on the disk.
    """
    folder = folder.absolute()  # as Orbax wants it
    items = _items(folder) or _items(_newest_step(folder))
    if not items:
        raise UserError(f"{folder} is a folder without an Orbax checkpoint: give a file of weights, or the folder Orbax wrote.")
    # Of Orbax's two interfaces, only the older one reads a part of a tree, and reads it as NumPy arrays on any devices.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        trees = {item: handler.metadata(where).tree for item, where in items.items()}
        whole = trees if len(trees) > 1 else next(iter(trees.values()))
        place = _place(whole)
        wanted = whole if place is None else _nested(place, _variables(_at(whole, place)))
        parts = wanted if len(trees) > 1 else {item: wanted for item in trees}
        leaves = jax.tree.leaves(wanted, is_leaf=_is_array)
        files = [file for where in items.values() for file in where.rglob("*") if file.is_file()]
        check_size(sum(map(_bytes, leaves)), sum(file.stat().st_size for file in files))
        read = {item: _restore(handler, items[item], part) for item, part in parts.items()}
    finally:
        handler.close()
    return flat(read if len(trees) > 1 else next(iter(read.values())))


def _place(tree: Mapping[str, Any]) -> Place | None:
    """The path in `tree` of the only mapping with `params`; None if there is none. Raises UserError if there are several."""
    places = list(_places(tree, DEPTH))
    if len(places) > 1:
        both = " and ".join("/".join((*place, "params")) for place in places[:2])
        raise UserError(f"the weights hold more than one network, {both}: save the variables of one.")
    return places[0] if places else None


def _places(tree: Mapping[str, Any], depth: int) -> Iterator[Place]:
    params = tree.get("params")
    if isinstance(params, Mapping) and set(params) - set(COLLECTIONS):
        yield ()
    elif depth:
        for name, branch in tree.items():
            if isinstance(branch, Mapping) and name != OPTIMIZER:
                yield from ((name, *place) for place in _places(branch, depth - 1))


def _variables(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree[name] for name in COLLECTIONS if name in tree}


def _at(tree: Any, place: Place) -> Any:
    for name in place:
        tree = tree[name]
    return tree


def _nested(place: Place, tree: Any) -> Any:
    for name in reversed(place):
        tree = {name: tree}
    return tree


def leaves(tree: Any) -> dict[Place, Any]:
    """The leaves of a tree by their paths. The members of a tuple, such as `sow` makes, have their numbers as names."""
    return {_steps(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def formed(like: Any, tree: Any) -> Any:
    """`tree`, but with a tuple wherever `like` has one. If `tree` has no leaves, or others than `like`, it stays as it is."""
    found = leaves(tree)
    if not found or found.keys() != leaves(like).keys():
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_steps(path)], like)


def _steps(path: Any) -> Place:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _named(tree: Any) -> dict[str, np.ndarray]:
    return {"/".join(place): np.asarray(leaf) for place, leaf in leaves(_as_linen(tree)).items()}


def _as_linen(tree: Any) -> Any:
    """`tree` with the names of Linen for members of lists: {"blocks": {0: ...}}, as in nnx, becomes {"blocks_0": ...}."""

    def members(name: str, part: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(part, Mapping) and part and all(isinstance(key, int) for key in part):
            for number, member in part.items():
                yield from members(f"{name}_{number}", member)
        else:
            yield name, _as_linen(part)

    return dict(pair for each in tree.items() for pair in members(*each)) if isinstance(tree, Mapping) else tree


def _items(folder: Path) -> dict[str, Path]:
    """Name -> folder of each tree in a checkpoint: `folder` itself, or the folders in it, such as `default` or `state`."""
    if (folder / TREE).is_file():
        return {"": folder}
    inside = [found.parent for found in sorted(folder.glob(f"*/{TREE}"))]
    return {item.name: item for item in inside if _step(item) is None and UNFINISHED not in item.name}


def _newest_step(folder: Path) -> Path:
    """The folder of the last step that has a checkpoint in it; `folder` if there is none."""
    steps = {step: child for child in folder.iterdir() if (step := _step(child)) is not None and _items(child)}
    return steps[max(steps)] if steps else folder


def _step(folder: Path) -> int | None:
    """12 for "12" and for "checkpoint_12"; None if the folder is no step."""
    found = re.fullmatch(r"(?:.*_)?(\d+)", folder.name)
    return int(found[1]) if found else None


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _bytes(leaf: Any) -> int:
    """Bytes that reading the described array takes. Whole chunks are unpacked, even if the array is smaller."""
    chunk = leaf.storage.chunk_shape if getattr(leaf, "storage", None) else None
    return max(math.prod(leaf.shape), math.prod(chunk or ())) * np.dtype(leaf.dtype).itemsize


def _restore(handler: ocp.PyTreeCheckpointHandler, folder: Path, like: Any) -> Any:
    """The part of the tree in `folder` that `like` describes, as NumPy arrays."""

    def each(make):
        return jax.tree.map(make, like, is_leaf=_is_array)

    arguments = ocp.args.PyTreeRestore(
        item=each(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)),
        restore_args=each(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    return handler.restore(folder, args=arguments)
