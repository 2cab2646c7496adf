"""Quantize a trained image network to 2-8 bits without a single real image: HAST (CVPR 2023) in JAX.

import hast_jax
student = hast_jax.quantize(model, variables, image=(32, 32, 3), mean=mean, std=std, bits="w4a4", budget="small")
logits = student(images)
student.save("student/")
"""

import importlib
from typing import TYPE_CHECKING, Any

from hast_jax.errors import AccuracyWarning, InputError, UserError

if TYPE_CHECKING:
    from hast_jax.deliver.exports import Exported, export
    from hast_jax.library import calibrate, evaluate, finetune, quantize, read_weights, synthesize
    from hast_jax.runs.progress import Update
    from hast_jax.stages.evaluate import Accuracy
    from hast_jax.student import Student, load

__version__ = "0.3.0"

__all__ = [
    "Accuracy",
    "AccuracyWarning",
    "Exported",
    "InputError",
    "Student",
    "Update",
    "UserError",
    "__version__",
    "calibrate",
    "evaluate",
    "export",
    "finetune",
    "load",
    "quantize",
    "read_weights",
    "synthesize",
]

_PLACES = {
    **dict.fromkeys(("calibrate", "evaluate", "finetune", "quantize", "read_weights", "synthesize"), "hast_jax.library"),
    "Exported": "hast_jax.deliver.exports",
    "export": "hast_jax.deliver.exports",
    "Student": "hast_jax.student",
    "load": "hast_jax.student",
    "Accuracy": "hast_jax.stages.evaluate",
    "Update": "hast_jax.runs.progress",
}


def __getattr__(name: str) -> Any:
    """Import a part of the library when it is first used, because Orbax and others take seconds to import."""
    if name not in _PLACES:
        raise AttributeError(f"module 'hast_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
