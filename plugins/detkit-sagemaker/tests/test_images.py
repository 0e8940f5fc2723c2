"""The built-in algorithm's image by region, and what is known of machines."""

from __future__ import annotations

import botocore.session
import pytest

from detkit.errors import UnknownName
from detkit_sagemaker.images import (
    BUILTIN_TRAINING,
    OBJECT_DETECTION,
    TRAINING_INSTANCE,
    builtin_image,
    dns_suffix,
    family,
    has_gpu,
    has_own_disks,
)
from detkit_sagemaker.requests import check_request


def test_images_are_where_aws_keeps_them() -> None:
    assert builtin_image("us-east-1") == "811284229777.dkr.ecr.us-east-1.amazonaws.com/object-detection:1"
    assert builtin_image("cn-north-1") == "390948362332.dkr.ecr.cn-north-1.amazonaws.com.cn/object-detection:1"


def test_every_region_of_the_table_is_one_that_botocore_knows_with_the_same_domain() -> None:
    session = botocore.session.get_session()
    partitions = {region: session.get_partition_for_region(region) for region in OBJECT_DETECTION}
    domains = {one["partition"]: one["dnsSuffix"] for one in session.get_data("endpoints")["partitions"]}
    assert {region: dns_suffix(region) for region in OBJECT_DETECTION} == {
        region: domains[partition] for region, partition in partitions.items()
    }
    assert all(len(account) == 12 and account.isdigit() for account in OBJECT_DETECTION.values())
    assert len(set(OBJECT_DETECTION.values())) == len(OBJECT_DETECTION) == 37


def test_a_region_without_the_image_is_refused_with_a_close_one() -> None:
    with pytest.raises(UnknownName, match="did you mean 'eu-west-.'.*installed backend"):
        builtin_image("eu-west-9")


@pytest.mark.parametrize(
    ("instance_type", "gpu", "disks"),
    [
        ("ml.g4dn.xlarge", True, True),
        ("ml.g5.12xlarge", True, True),
        ("ml.g6e.2xlarge", True, True),
        ("ml.p3.2xlarge", True, False),
        ("ml.p3dn.24xlarge", True, True),
        ("ml.p4d.24xlarge", True, True),
        ("ml.m5.large", False, False),
        ("ml.m5d.large", False, True),
        ("ml.c5n.xlarge", False, False),
        ("ml.m6gd.xlarge", False, True),
        ("ml.t3.medium", False, False),
        ("ml.r5d.large", False, True),
        ("ml.m7i-flex.large", False, False),
        ("ml.inf1.xlarge", False, False),
    ],
)
def test_what_a_machine_has(instance_type: str, gpu: bool, disks: bool) -> None:
    assert (has_gpu(instance_type), has_own_disks(instance_type)) == (gpu, disks)


def test_the_machine_that_is_taken_unless_told_is_one_that_everything_trains_on() -> None:
    assert family(TRAINING_INSTANCE) in BUILTIN_TRAINING
    problems = check_request("CreateTrainingJob", {"ResourceConfig": {"InstanceType": TRAINING_INSTANCE}})
    assert not any("InstanceType" in problem for problem in problems)
