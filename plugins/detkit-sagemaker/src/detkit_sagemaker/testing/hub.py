"""JumpStart's public hub: the documents of ``hub/*.json``, and the artifacts they name.

The documents are written for the simulator (each says so in ``Synthetic``). Their fields are AWS's.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detkit_sagemaker.testing.account import Account, Json
from detkit_sagemaker.testing.listing import page
from detkit_sagemaker.testing.refusals import NotFound
from detkit_sagemaker.testing.storage import split

HUB = "SageMakerPublicHub"
_FOLDER = Path(__file__).parent / "hub"
_CREATED = datetime(2024, 1, 1, tzinfo=UTC)
_SCHEMA = "2.2.0"

_SCRIPT = '''"""Synthetic: what AWS's script would do, the stand-in does that the container has."""

import sys

from detkit_sagemaker.container.stand_ins.__main__ import main

sys.exit(main(["jumpstart", "script", *sys.argv[1:]]))
'''


@functools.cache
def documents() -> dict[str, str]:
    """Return the text of every model's document by the model's id; ``{region}`` stands for the region."""
    return {path.stem: path.read_text() for path in sorted(_FOLDER.glob("*.json"))}


def images() -> set[str]:
    """Return the URIs of all images that the documents name."""
    found = set()
    for document in map(json.loads, documents().values()):
        found |= {document[name] for name in ("TrainingEcrUri", "HostingEcrUri") if name in document}
        for name in ("TrainingInstanceTypeVariants", "HostingInstanceTypeVariants"):
            machines = document.get(name, {}).get("Variants", {}).values()
            found |= {machine["Properties"]["ImageUri"] for machine in machines}
    return found


class Hub:
    """SageMaker's operations on the contents of a hub."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._published: set[str] = set()

    def describe_hub_content(self, request: Json) -> Json:
        """Describe a model; what its document names exists in S3 from then on."""
        name = request["HubContentName"]
        summaries = {one["HubContentName"]: one for one in self._summaries(request)}
        wanted = request.get("HubContentVersion", "")
        if name not in summaries or wanted not in ("", "*", summaries[name]["HubContentVersion"]):
            version = f" version {wanted}" if wanted else ""
            raise NotFound(f"Could not find hub content {name}{version} in hub {request['HubName']}.")
        document = self._document(name)
        self._publish(name, json.loads(document))
        return {**summaries[name], "HubName": HUB, "HubArn": self._arn("hub", HUB), "HubContentDocument": document}

    def list_hub_contents(self, request: Json) -> Json:
        """List the models."""
        wanted = request.get("NameContains", "").lower()
        found = [one for one in self._summaries(request) if wanted in one["HubContentName"]]
        if request.get("SortOrder", "Ascending") == "Descending":
            found.reverse()
        return page(found, request, "HubContentSummaries")

    def _summaries(self, request: Json) -> list[Json]:
        if request["HubName"] not in (HUB, self._arn("hub", HUB)):
            raise NotFound(f"Could not find hub {request['HubName']}.")
        if request["HubContentType"] != "Model":
            return []
        return [self._summary(name) for name in documents()]

    def _summary(self, name: str) -> Json:
        version = json.loads(self._document(name))["HubContentVersion"]
        return {
            "HubContentName": name,
            "HubContentArn": self._arn("hub-content", f"{HUB}/Model/{name}/{version}"),
            "HubContentVersion": version,
            "HubContentType": "Model",
            "DocumentSchemaVersion": _SCHEMA,
            "HubContentDisplayName": name,
            "HubContentStatus": "Available",
            "CreationTime": _CREATED,
        }

    def _arn(self, kind: str, name: str) -> str:
        return f"arn:aws:sagemaker:{self._account.region}:aws:{kind}/{name}"

    def _document(self, name: str) -> str:
        return documents()[name].replace("{region}", self._account.region)

    def _publish(self, name: str, document: Json) -> None:
        with self._account.lock:
            if name in self._published:
                return
            self._published.add(name)
        s3 = self._account.client("s3")
        for member, uri in document.items():
            if isinstance(uri, str) and uri.startswith("s3://"):
                bucket, _ = split(uri)
                create_bucket(s3, bucket, self._account.region)
                files = {"synthetic.json": json.dumps({"synthetic": True, "model_id": name, "is": member})}
                if member == "TrainingScriptUri":
                    files["transfer_learning.py"] = _SCRIPT
                self._account.storage.write(uri, _archive(files))


def create_bucket(s3: Any, bucket: str, region: str) -> None:
    """Create a bucket unless it is there."""
    where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        s3.create_bucket(Bucket=bucket, **where)
    except (s3.exceptions.BucketAlreadyOwnedByYou, s3.exceptions.BucketAlreadyExists):
        return


def _archive(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return packed.getvalue()
