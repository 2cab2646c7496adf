"""The logs of a run that was killed and goes on."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from hast_jax.runs.progress import Recorder, read_metrics


def session(folder: Path, done: int, until: int) -> None:
    """From step `done` to `until`, each tenth step logged."""
    reporter = Recorder(folder)
    with reporter.stage("finetune", 30, done) as progress:
        for step in range(done + 10, until + 1, 10):
            progress.update(step, {"loss": float(step)})
    reporter.close()


def events(file: Path) -> list[Event]:
    """Of a file of TFRecords: length (8 bytes), its checksum (4), data, their checksum (4)."""
    content, position, found = file.read_bytes(), 0, []
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        found.append(Event.FromString(content[position + 12 : position + 12 + length]))
        position += 12 + length + 4
    return found


def test_what_a_killed_run_logged_after_its_checkpoint_is_dropped(tmp_path: Path) -> None:
    session(tmp_path, done=0, until=20)
    (first,) = (tmp_path / "tensorboard" / "finetune").iterdir()
    first = first.rename(first.with_name("events.out.tfevents.0"))  # its name is of the second in which it was made
    session(tmp_path, done=10, until=30)

    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert steps == [10, 20, 30]

    (second,) = set((tmp_path / "tensorboard" / "finetune").iterdir()) - {first}
    purged = [event.step for event in events(second) if event.session_log.status == SessionLog.START]
    assert purged == [11], "TensorBoard leaves out what earlier files say of this step and later ones"
