"""Convert and run with LiteRT in a process of its own, because LiteRT's libraries bring a second copy of JAX's compiler.

    python -m hast_jax.deliver.litert_process convert program.mlir model.tflite
    python -m hast_jax.deliver.litert_process run images.npy FOLDER model.tflite [other.tflite ...]

`run` writes two files into FOLDER. logits.npy holds the logits of the first model. found.json holds its operators, and the
milliseconds of each model for one image, measured in turns.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 20


def convert(program: str, model: str) -> None:
    """Convert a StableHLO program, as text, to a LiteRT model. Both are paths."""
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(Path(program).read_text())
        config = converter.ConvertToTFLConfig()
        config.model_origin_framework = "JAX"
        # Any other mode rounds biases to integers, which changes the student.
        config.qdq_conversion_mode = "NONE"
        config.strict_qdq_mode = True
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        Path(model).write_bytes(converter.export_flatbuffer_to_bytes(module.operation))


def run(images: str, folder: str, *models: str) -> None:
    """Compute logits, one image at a time on one thread, and measure the models. All arguments are paths."""
    from ai_edge_litert import interpreter

    runs = [interpreter.Interpreter(model_path=model, num_threads=1) for model in models]
    for each in runs:
        each.allocate_tensors()
    batch = np.load(images)
    logits = np.stack([_judge(runs[0], image) for image in batch])
    best = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for i, each in enumerate(runs):
            start = time.perf_counter()
            _judge(each, batch[0])
            best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    np.save(Path(folder) / "logits.npy", logits)
    (Path(folder) / "found.json").write_text(json.dumps({"operators": _operators(runs[0]), "milliseconds": best}))


def _judge(run: Any, image: np.ndarray) -> np.ndarray:
    run.set_tensor(run.get_input_details()[0]["index"], image[None])
    run.invoke()
    return run.get_tensor(run.get_output_details()[0]["index"])[0]


def _operators(run: Any) -> list[tuple[str, str, int]]:
    """(type, kind, number) of the operators, as in `Exported`."""

    def kind(tensor):
        return np.dtype(run._get_tensor_details(int(tensor), 0)["dtype"]).kind

    counted: Counter[tuple[str, str]] = Counter()
    for each in run._get_ops_details():
        if each["op_name"] != "DELEGATE":  # a delegate stands for operators that are listed as well
            ends = {kind(each[side][0]) in "iu" for side in ("inputs", "outputs")}
            counted[each["op_name"], "between" if len(ends) == 2 else "integer" if ends == {True} else "float"] += 1
    return [(name, kind, number) for (name, kind), number in sorted(counted.items(), key=lambda item: -item[1])]


if __name__ == "__main__":
    work: Any = {"convert": convert, "run": run}[sys.argv[1]]
    work(*sys.argv[2:])
