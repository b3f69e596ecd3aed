"""Metrics: cut to what the checkpoint knows, and readable as TensorBoard events."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from compressjax.core import errors
from train import metrics


def events(folder):
    """{(tag, step): value} of the one events file."""
    (file,) = folder.iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = round(value.simple_value, 6)
        at += 12 + length + 4
    return found


def test_a_resumed_run_has_each_line_once(tmp_path):
    first = metrics.Metrics(tmp_path, {})
    first.write({"stage": "a", "epoch": 0, "total_step": 0}, {"test_loss": 2.0})
    sizes = first.sizes()
    first.write({"stage": "a", "epoch": 1, "total_step": 9}, {"test_loss": 1.0})
    first.close()

    again = metrics.Metrics(tmp_path, sizes)
    again.write({"stage": "a", "epoch": 1, "total_step": 9}, {"test_loss": 0.5})
    again.close()
    assert [row["test_loss"] for row in again.rows()] == [2.0, 0.5]
    assert events(tmp_path / "tensorboard") == {
        ("test_loss", 0): 2.0,
        ("test_loss", 9): 0.5,
    }
    times = (tmp_path / "times.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in times] == [0, 1]


def test_metrics_that_were_cut_are_not_gone_on_from(tmp_path):
    first = metrics.Metrics(tmp_path, {})
    first.write({"stage": "a", "epoch": 0, "total_step": 0}, {"test_loss": 2.0})
    sizes = first.sizes()
    first.close()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(errors.CheckpointError, match="metrics.jsonl: resume: has 0"):
        metrics.Metrics(tmp_path, sizes)


def test_a_new_run_starts_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"half a li')
    found = metrics.Metrics(tmp_path, {})
    assert found.rows() == []
    found.close()
