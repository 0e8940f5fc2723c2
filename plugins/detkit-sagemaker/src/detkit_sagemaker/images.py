"""Images of the built-in algorithm by region, and which machines are plausible for what."""

from __future__ import annotations

import re
from collections.abc import Mapping

from detkit.errors import UnknownName

TRAINING_INSTANCE = "ml.g4dn.xlarge"
"""The cheapest machine with a GPU that every one of the three ways trains on."""

OBJECT_DETECTION: Mapping[str, str] = {
    "af-south-1": "455444449433",
    "ap-east-1": "286214385809",
    "ap-northeast-1": "501404015308",
    "ap-northeast-2": "306986355934",
    "ap-northeast-3": "867004704886",
    "ap-south-1": "991648021394",
    "ap-south-2": "628508329040",
    "ap-southeast-1": "475088953585",
    "ap-southeast-2": "544295431143",
    "ap-southeast-3": "951798379941",
    "ap-southeast-4": "106583098589",
    "ca-central-1": "469771592824",
    "ca-west-1": "190319476487",
    "cn-north-1": "390948362332",
    "cn-northwest-1": "387376663083",
    "eu-central-1": "813361260812",
    "eu-central-2": "680994064768",
    "eu-north-1": "669576153137",
    "eu-south-1": "257386234256",
    "eu-south-2": "104374241257",
    "eu-west-1": "685385470294",
    "eu-west-2": "644912444149",
    "eu-west-3": "749696950732",
    "il-central-1": "898809789911",
    "me-central-1": "272398656194",
    "me-south-1": "249704162688",
    "sa-east-1": "855470959533",
    "us-east-1": "811284229777",
    "us-east-2": "825641698319",
    "us-gov-east-1": "237065988967",
    "us-gov-west-1": "226302683700",
    "us-iso-east-1": "490574956308",
    "us-isob-east-1": "765400339828",
    "us-isof-east-1": "108575199400",
    "us-isof-south-1": "124985052026",
    "us-west-1": "632365934929",
    "us-west-2": "433757028032",
}
"""The account that holds the built-in algorithm's image in each region, from the pages "Docker Registry Paths and
Example Code" of the SageMaker documentation, as AWS's own SDK lists them in August 2026."""

_SUFFIXES = (
    ("cn-", "amazonaws.com.cn"),
    ("us-iso-", "c2s.ic.gov"),
    ("us-isob-", "sc2s.sgov.gov"),
    ("us-isof-", "csp.hci.ic.gov"),
)
"""Domains of the partitions beside ``amazonaws.com``, from botocore's table of partitions."""

BUILTIN_TRAINING = ("p2", "p3", "p3dn", "g4dn", "g5")
"""Families that the page "Object Detection - MXNet" names for training; only machines with a GPU."""

BUILTIN_HOSTING = ("c4", "c5", "c5d", "m4", "m5", "m5d", "p2", "p3", "g4dn", "g5")
"""Families on which the built-in's image answers: CPUs of the generations that page names, and its GPUs."""

_OWN_DISKS = re.compile(
    r"(g[4-9]\w*|p3dn|p[4-9][a-z0-9-]*|trn\w+|dl1|[cmr]\d[a-z]*d[a-z]*)"
)  # families with NVMe disks
_GPU = re.compile(r"[gp]\d.*")


def family(instance_type: str) -> str:
    """Return ``g4dn`` of ``ml.g4dn.xlarge``."""
    return instance_type.removeprefix("ml.").partition(".")[0]


def has_gpu(instance_type: str) -> bool:
    """Return whether a machine has an NVIDIA GPU."""
    return _GPU.fullmatch(family(instance_type)) is not None


def has_own_disks(instance_type: str) -> bool:
    """Return whether a machine has NVMe disks of its own, whose volumes take no KMS key."""
    return _OWN_DISKS.fullmatch(family(instance_type)) is not None


def builtin_image(region: str) -> str:
    """Return the address of the built-in algorithm's image. Raises `UnknownName` for a region that has none."""
    if region not in OBJECT_DETECTION:
        raise UnknownName(
            "image of SageMaker's built-in object detection in region",
            region,
            OBJECT_DETECTION,
            "train there with a model of an installed backend, or choose another region",
        )
    return f"{OBJECT_DETECTION[region]}.dkr.ecr.{region}.{dns_suffix(region)}/object-detection:1"


def dns_suffix(region: str) -> str:
    """Return the domain that AWS's services have in a region."""
    return next((suffix for start, suffix in _SUFFIXES if region.startswith(start)), "amazonaws.com")
