"""Input channels: checked when a job is created, laid out below ``input/data`` when it starts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from detkit_sagemaker.testing.pipes import Pipe, augmented, objects
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.storage import Storage, protect

Json = dict[str, Any]


def check(channels: list[Json], default_mode: str, storage: Storage) -> None:
    """Raise `Refused` for channels that AWS refuses, and for sources that are not in S3."""
    names = [channel["ChannelName"] for channel in channels]
    if len(set(names)) < len(names):
        raise Refused(f"Duplicate channel names: {', '.join(names)}")
    for channel in channels:
        name, mode, source = channel["ChannelName"], mode_of(channel, default_mode), s3_source(channel)
        kind = source["S3DataType"]
        if kind not in ("S3Prefix", "ManifestFile", "AugmentedManifestFile"):
            raise Refused(f"channel {name}: S3DataType {kind} is not simulated")
        if kind == "AugmentedManifestFile":
            if mode != "Pipe":
                raise Refused(f"channel {name}: AugmentedManifestFile can only be used with Pipe input mode")
            if not source.get("AttributeNames"):
                raise Refused(f"channel {name}: AugmentedManifestFile needs AttributeNames")
        elif source.get("AttributeNames"):
            raise Refused(f"channel {name}: AttributeNames are only for AugmentedManifestFile")
        if mode == "FastFile" and kind != "S3Prefix":
            raise Refused(f"channel {name}: FastFile input mode supports S3Prefix only")
        if mode != "Pipe" and channel.get("CompressionType", "None") != "None":
            raise Refused(f"channel {name}: CompressionType can only be used with Pipe input mode")
        if mode != "Pipe" and channel.get("RecordWrapperType", "None") != "None":
            raise Refused(f"channel {name}: RecordWrapperType can only be used with Pipe input mode")
        if kind == "AugmentedManifestFile":
            augmented(storage, source["S3Uri"], source["AttributeNames"])
        else:
            storage.items(source["S3Uri"], kind)


def s3_source(channel: Json) -> Json:
    """Return the S3 data source of a channel."""
    source: Json | None = channel["DataSource"].get("S3DataSource")
    if source is None:
        raise Refused(f"channel {channel['ChannelName']}: only S3DataSource is simulated")
    return source


def mode_of(channel: Json, default: str) -> str:
    """Return ``File``, ``FastFile`` or ``Pipe``."""
    return str(channel.get("InputMode", default))


def config(channels: list[Json], default_mode: str) -> dict[str, dict[str, str]]:
    """Return the content of ``inputdataconfig.json``."""
    described = {}
    for channel in channels:
        one = {
            "TrainingInputMode": mode_of(channel, default_mode),
            "S3DistributionType": s3_source(channel).get("S3DataDistributionType", "FullyReplicated"),
            "RecordWrapperType": channel.get("RecordWrapperType", "None"),
        }
        if "ContentType" in channel:
            one["ContentType"] = channel["ContentType"]
        described[channel["ChannelName"]] = one
    return described


def lay_out(
    channels: list[Json],
    default_mode: str,
    storage: Storage,
    folder: Path,
    *,
    shard: tuple[int, int],
    over: threading.Event,
) -> list[Pipe]:
    """Write the channels into ``input/data``; return the pipes of those that are streamed, to be started.

    ``shard`` is the host's number and the number of hosts: ``ShardedByS3Key`` gives each host its share. The pipes
    end when ``over`` is set.
    """
    pipes = []
    for channel in channels:
        source, mode = s3_source(channel), mode_of(channel, default_mode)
        index, count = shard if source.get("S3DataDistributionType") == "ShardedByS3Key" else (0, 1)
        if mode != "Pipe":
            items = storage.items(source["S3Uri"], source["S3DataType"])[index::count]
            target = folder / channel["ChannelName"]
            target.mkdir()
            storage.download(items, target)
            if mode == "FastFile":
                protect(target)
            continue
        if source["S3DataType"] == "AugmentedManifestFile":
            records = augmented(storage, source["S3Uri"], source["AttributeNames"])[index::count]
        else:
            items = storage.items(source["S3Uri"], source["S3DataType"])[index::count]
            records = objects(storage, items, channel.get("CompressionType") == "Gzip")
        wrapped = channel.get("RecordWrapperType", "None") == "RecordIO"
        seed = channel.get("ShuffleConfig", {}).get("Seed")
        pipes.append(Pipe(folder / channel["ChannelName"], records, wrapped, seed, over))
    return pipes
