"""Reads TensorBoard's event files: records of a length, its checksum, an event and its checksum."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def events(folder: Path) -> Iterator[Event]:
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of each scalar, in the order of writing."""
    steps: dict[str, list[int]] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                steps.setdefault(value.tag, []).append(event.step)
    return steps


def hyperparameters(folder: Path) -> dict[str, object]:
    """Settings for the tab of hyperparameters; empty before the end of a run."""
    settings: dict[str, object] = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for key, setting in data.session_start_info.hparams.items():
                    settings[key] = getattr(setting, setting.WhichOneof("kind"))
    return settings
