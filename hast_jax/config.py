"""The config: its sections, its checks before any work, and its form in JSON.

A config file in `configs/` calls `default()` and changes the fields that its experiment needs. The other fields keep the
settings of HAST for CIFAR-100. fields.py describes every field.
"""

import functools
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, FieldReference

from hast_jax.cross_checks import CROSS_CHECKS
from hast_jax.errors import InputError, UserError
from hast_jax.fields import FIELDS
from hast_jax.kinds import close, shown
from hast_jax.networks import user_files

# The recipe that loses the least accuracy; docs/trials.md says what each part gains. Other configs have the paper's settings.
BEST: dict[str, Any] = {
    "synthesis.lr": 0.2,
    "synthesis.schedule": "cosine",
    "synthesis.scales": 6,
    "synthesis.crop": "image",
    "synthesis.crop_probability": 1.0,
    "synthesis.crop_scale": 0.7,
    "synthesis.beta": 1.0,
    "synthesis.gamma": 0.0,
    "calibration.range": "mse",
    "calibration.batches": 20,
    "calibration.batch": 64,
    "finetune.optimizer": "adam",
    "finetune.lr": 3e-4,
    "finetune.schedule": "cosine",
    "finetune.ranges": "learned",
    "finetune.temperature": 4.0,
    "finetune.alpha": 1.0,
    "finetune.lam": 0.0,
    "finetune.epochs": 20,
}

# Variants of the CIFAR configs. `small` is a budget for two cores; `best,small` is that budget for the recipe `best`. `best,w2`
# is the recipe for weights of two bits, which must change more (docs/trials.md).
VARIANTS: dict[str, dict[str, Any]] = {
    "best": BEST,
    "small": {
        "synthesis.images": 1536,
        "synthesis.iterations": 500,
        "finetune.batch": 64,
        "finetune.epochs": 20,
        "eval.every": 4,
    },
    "best,small": {
        "synthesis.images": 1024,
        "synthesis.iterations": 200,
        "finetune.epochs": 12,
    },
    "best,w2": {"finetune.lr": 1e-3},
}

# Section -> the names of its fields.
SECTIONS: dict[str, frozenset[str]] = {
    section: frozenset(path.split(".")[-1] for path in FIELDS if path.startswith(f"{section}."))
    for section in dict.fromkeys(path.split(".")[0] for path in FIELDS if "." in path)
}

# Fields that may change when a run resumes. They do not change the student, or the run checks what they name.
FREE_FIELDS = tuple(path for path, described in FIELDS.items() if described.free)

# Fields that may differ between the processes of one run: local paths, and `devices`.
OWN_FIELDS = tuple(path for path, described in FIELDS.items() if described.own)


class Section(ConfigDict):
    """The whole config or one section: a locked ConfigDict whose fields take only values of their kinds.

    Setting an unknown field or a value of another kind raises UserError. `validate` checks whether the values are possible.
    """

    def __setitem__(self, name: Any, value: Any) -> None:
        """Set a field. For a section, set the fields that a dict names."""
        if self.is_locked and not isinstance(value, FieldReference):
            path = self._path(name)
            if name not in self:
                raise _unknown(path)
            if path in SECTIONS:
                _update_section(self[name], path, value)
                return
            value = _of_its_kind(path, value)
        super().__setitem__(name, value)

    def update_from_flattened_dict(self, flattened_dict: Mapping[str, Any], strip_prefix: str = "") -> None:
        """Set fields by paths such as "finetune.eps"."""
        for path in flattened_dict:
            if not strip_prefix:
                check_name(self._path(path))
        super().update_from_flattened_dict(flattened_dict, strip_prefix)

    def _path(self, name: Any) -> str:
        # A copied section has lost its name, but its field names tell the section.
        section = next((f"{section}." for section, names in SECTIONS.items() if names == frozenset(self)), "")
        return f"{section}{name}"


def _update_section(section: ConfigDict, path: str, values: Any) -> None:
    if not isinstance(values, dict | ConfigDict):
        raise InputError(f"config.{path} is {shown(values)}: it must be a section with fields.")
    for name, value in values.items():
        section[name] = value


def _of_its_kind(path: str, value: Any) -> Any:
    try:
        return FIELDS[path].convert(value)
    except TypeError as error:
        raise refusal(path, value, FIELDS[path].kind()) from error


def refusal(path: str, value: Any, wanted: str) -> UserError:
    """The error of a field with a wrong value. wanted: what the value must be, in words."""
    return InputError(f"config.{path} is {shown(value)}: it must be {wanted}.")


def check_name(path: str) -> None:
    """Raise UserError if no config has this field or section."""
    if path not in FIELDS and path not in SECTIONS:
        raise _unknown(path)


def _unknown(path: str) -> UserError:
    name = shown(path).strip("'\"")  # a name from a stranger's file may hold line breaks
    same = " or ".join(field for field in FIELDS if field.rpartition(".")[2] == name)
    meant = f" (did you mean {same}?)" if same else close(path, FIELDS)
    return InputError(f"config.{name} is unknown{meant or ' (docs/configuration.md lists all fields)'}.")


def default() -> ConfigDict:
    """A locked config in which every field has its default."""
    values = unflatten_dict({path: described.default for path, described in FIELDS.items()}, sep=".")
    sections = {name: Section(value) if isinstance(value, dict) else value for name, value in values.items()}
    return Section(sections).lock()


def variant(config: ConfigDict, argument: str, variants: dict[str, Any] = VARIANTS) -> ConfigDict:
    """Apply the argument of a config file, such as "w4a4,best,small": bits and names in `variants`, in any order.

    variants: name -> fields to change, as a flat {"finetune.lr": value}. The fields of "best,small" are changed if both names
    are given, and those of "best,w2" if `best` is given and weights have two bits. If two variants change a field, the later
    one in `variants` wins. Raises UserError for an unknown word, two bit widths or two networks.
    """
    chosen, names = None, set()
    for word in filter(None, argument.split(",")):
        if word in variants:
            names.add(word)
        elif bits := re.fullmatch(r"w(\d{1,2})a(\d{1,2})", word.lower(), re.ASCII):
            if chosen not in (None, bits[0]):
                raise InputError(f"the config has one number of bits, not {chosen} and {bits[0]}: choose one.")
            chosen = bits[0]
            config.bits.weights, config.bits.activations = int(bits[1]), int(bits[2])
        else:
            known = ", ".join(["w4a4 (any bits)", *(name for name in variants if "," not in name)])
            raise InputError(f"the config has no variant {word!r}: choose from {known}.")
    networks = [name for name in sorted(names) if "teacher.network" in variants[name]]
    if len(networks) > 1:
        raise InputError(f"the config has one network, not {' and '.join(networks)}: choose one.")
    names.add(f"w{config.bits.weights}")
    for name, fields in variants.items():
        if names.issuperset(name.split(",")):
            config.update_from_flattened_dict(fields)
    return config


def validate(config: ConfigDict) -> None:
    """Raise UserError, in one sentence, for the first field that is unknown or missing, or whose value is impossible."""
    if not isinstance(config, ConfigDict):
        raise InputError(f"the config is {shown(config)}: get_config must return what hast_jax.config.default() gave.")
    values = _flat(config)
    for path in values:
        check_name(path)
    for path, described in FIELDS.items():
        if path not in values:
            raise InputError(f"config.{path} is missing: begin with hast_jax.config.default().")
        wanted = described.fault(values[path])
        if wanted:
            raise refusal(path, values[path], wanted)
    for check in CROSS_CHECKS:
        for path, wanted in check(config):
            raise refusal(path, values[path], wanted)


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Path -> value. A dict in a field that is no section counts as a value."""
    flat = {}
    for name, value in config.to_dict().items():
        inside = isinstance(value, dict) and name in SECTIONS
        flat.update({f"{name}.{inner}": each for inner, each in value.items()} if inside else {str(name): value})
    return flat


def field(config: ConfigDict, path: str) -> Any:
    """The value of a field such as "finetune.eps"."""
    return functools.reduce(lambda section, name: section[name], path.split("."), config)


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """A line "field: old -> new" for each field that differs, except `FREE_FIELDS` and a network's file that has moved."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        path, a, b = prefix + name, old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += difference(a, b, path + ".")
        elif a != b and path not in FREE_FIELDS and not _mean_the_same(path, a, b):
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines


def _mean_the_same(path: str, a: Any, b: Any) -> bool:
    """Whether two values of a field mean the same.

    The file of a user's class may have moved: a run checks what its network computes. JSON may be written in several ways.
    """
    if path == "teacher.network":
        own = user_files.is_own(str(a)) and user_files.is_own(str(b))
        return own and a.rpartition(":")[2] == b.rpartition(":")[2]
    try:
        return path in ("teacher.arguments", "teacher.call") and json.loads(a or "{}") == json.loads(b or "{}")
    except (TypeError, ValueError):  # the folder may be damaged, or of another version
        return False


def checksum(config: ConfigDict) -> int:
    """A checksum below 2**32 of all fields but `OWN_FIELDS`. It must be the same in all processes of one run."""
    flat = flatten_dict(to_dict(config), sep=".")
    common = {path: value for path, value in flat.items() if path not in OWN_FIELDS}
    return zlib.crc32(json.dumps(common, sort_keys=True).encode())


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The config of a dict that `to_dict` made. A missing field, as in a dict of an older version, has its default.

    Raises UserError for an unknown field or a wrong kind.
    """
    if not isinstance(values, dict):
        raise InputError(f"the config is {shown(values)}: it must be a dict of fields.")
    config = default()
    for name, value in values.items():
        config[name] = value
    return config
