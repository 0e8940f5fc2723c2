"""What the service would reject, found before anything is created. Only calls that read are made, and few.

A check that the credentials do not allow becomes a warning that says what was not looked at. Expired credentials and a
service that cannot be reached are raised, as nothing else would work either.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from PIL import Image as PillowImage

from detkit.data import Dataset
from detkit.errors import DetkitError, ImageError
from detkit.images import read_bytes, read_header
from detkit.plans import Concern
from detkit.recordio import packed
from detkit.sagemaker_object_detection import BuiltinParams
from detkit_sagemaker import images
from detkit_sagemaker.answers import READ_BY_AWS
from detkit_sagemaker.aws import AccessDenied, Aws, AwsError, explained
from detkit_sagemaker.builtin import hyperparameters, needed_label_width
from detkit_sagemaker.options import AccountOptions, SagemakerOptions

Way = Literal["builtin", "jumpstart", "ours"]
Use = Literal["training", "spot", "transform", "hosting"]

QUOTAS: Mapping[Use, str] = {
    "training": "{} for training job usage",
    "spot": "{} for spot training job usage",
    "transform": "{} for transform job usage",
    "hosting": "{} for endpoint usage",
}
"""What Service Quotas calls the number of machines of a type that may run at once."""

_TRUSTED = "sagemaker.amazonaws.com"
_MISSING = {
    *("404", "NoSuchBucket", "NoSuchEntity", "NoSuchEntityException"),
    *("RepositoryNotFoundException", "ImageNotFoundException"),
}
_ECR = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr(-fips)?\.(?P<region>[a-z0-9-]+)\.[a-z0-9.-]+/(?P<repository>[^:@]+)"
    r"(:(?P<tag>[^@]+)|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SHOWN = 3
_SHARE_OF_DISK = 0.8
_CHANNELS = ("train", "validation")

Odd = Literal["channels", "format", "turned"]


def account(
    aws: Aws, *, role_arn: str, output: str, needs: Mapping[tuple[Use, str], int], image_uri: str | None = None
) -> list[Concern]:
    """Return everything that is wrong with the account: role, bucket, quotas, and our image where one is used."""
    ours = own_image(aws, image_uri) if image_uri is not None else []
    return [*role(aws, role_arn), *bucket(aws, output), *quotas(aws, needs), *ours]


def role(aws: Aws, arn: str) -> list[Concern]:
    """Return what is wrong with an execution role: it is there, and SageMaker may take it on (iam:GetRole)."""
    name = arn.rpartition("/")[2]
    account = arn.split(":")[4] if arn.count(":") >= 5 else ""
    if account and account != aws.account:
        return [_warning(f"role {arn} is of account {account}, so whether SageMaker may take it on was not looked at")]

    def look() -> list[Concern]:
        with explained(f"looking at role {name} (iam:GetRole)"):
            found = aws.client("iam").get_role(RoleName=name)["Role"]
        if not _trusts(found.get("AssumeRolePolicyDocument")):
            return [
                _error(
                    f"role {name} does not trust {_TRUSTED}, so SageMaker may not take it on; add that service to the "
                    "role's trust policy, or make one, `detkit sagemaker setup --print` shows it"
                )
            ]
        return []

    missing = f"there is no role {name}; give another (role=), or make one, `detkit sagemaker setup --print` shows it"
    return _looked_at(look, f"role {name}", _error(missing))


def bucket(aws: Aws, url: str) -> list[Concern]:
    """Return what is wrong with the bucket of an S3 address: it is there, ours to use, and in the region."""
    name = url.removeprefix("s3://").partition("/")[0]

    if name == aws.bucket:
        missing = _warning(f"bucket {name} is not there yet and will be created")
    else:
        create = f"`aws s3 mb s3://{name} --region {aws.region}` creates it, or leave output= out for {aws.bucket}"
        missing = _error(f"there is no bucket {name}; {create}")
    return _looked_at(lambda: _other_region(aws, name), f"bucket {name}", missing)


def data_bucket(aws: Aws, name: str) -> list[Concern]:
    """Return what is wrong with a bucket, other than the job's own, in which images stay: its region, and who reads it.

    What a role may do is not looked at, which would take rights that few have.
    """
    missing = _error(f"there is no bucket {name}, in which images are to stay")
    found = _looked_at(lambda: _other_region(aws, name), f"bucket {name}", missing)
    allow = f"`detkit sagemaker setup --data-bucket {name} --apply` lets detkit's role"
    return [*found, _warning(f"images stay in bucket {name}, which the job's role has to be allowed to read; {allow}")]


def _other_region(aws: Aws, name: str) -> list[Concern]:
    with explained(f"looking for the bucket {name} (s3:HeadBucket)"):
        answer = aws.client("s3").head_bucket(Bucket=name)
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = answer.get("BucketRegion") or headers.get("x-amz-bucket-region") or aws.region
    if region == aws.region:
        return []
    return [_error(f"bucket {name} is in {region}, and the job in {aws.region}; both have to be in one region")]


def builtin_image(region: str) -> list[Concern]:
    """Return whether a region lacks the built-in algorithm. Asks nobody."""
    try:
        images.builtin_image(region)
    except DetkitError as error:
        return [_error(str(error))]
    return []


def own_image(aws: Aws, uri: str) -> list[Concern]:
    """Return what is wrong with the image of our container: in ECR, in the region, there (ecr:DescribeImages)."""
    found = _ECR.fullmatch(uri)
    build = "`detkit sagemaker build-image` makes one"
    if found is None:
        return [
            _error(
                f"image_uri={uri!r} is no image in ECR, and SageMaker takes no others; expected "
                f"<account>.dkr.ecr.{aws.region}.amazonaws.com/<repository>:<tag>; {build}"
            )
        ]
    if found["region"] != aws.region:
        return [_error(f"image {uri} is in {found['region']}, and the job in {aws.region}; push it there, {build}")]
    which = {"imageDigest": found["digest"]} if found["digest"] else {"imageTag": found["tag"] or "latest"}

    def look() -> list[Concern]:
        with explained(f"looking for image {uri} (ecr:DescribeImages)"):
            aws.client("ecr").describe_images(
                registryId=found["account"], repositoryName=found["repository"], imageIds=[which]
            )
        return []

    return _looked_at(look, f"image {uri}", _error(f"there is no image {uri}; {build}"))


def quotas(aws: Aws, needs: Mapping[tuple[Use, str], int]) -> list[Concern]:
    """Return the quotas that are too small for so many machines, by use and type (servicequotas:ListServiceQuotas).

    What runs already is not counted.
    """
    wanted = {QUOTAS[use].format(instance_type): count for (use, instance_type), count in needs.items()}

    def look() -> list[Concern]:
        with explained("looking at the quotas (servicequotas:ListServiceQuotas)"):
            found = _quotas(aws, set(wanted))
        return [c for name, count in wanted.items() if (c := _quota(name, found.get(name), count)) is not None]

    return _looked_at(look, "the quotas of SageMaker", None) if wanted else []


def machine(way: Way, options: SagemakerOptions, instance_type: str) -> list[Concern]:
    """Return what speaks against training on a machine. Asks nobody."""
    found = []
    family = images.family(instance_type)
    if way == "builtin" and not images.has_gpu(instance_type):
        found.append(
            _error(
                f"instance_type={instance_type} has no GPU, and the built-in algorithm trains on GPUs only; choose "
                f"one of the families {', '.join(images.BUILTIN_TRAINING)}, e.g. {images.TRAINING_INSTANCE}"
            )
        )
    elif way == "builtin" and family not in images.BUILTIN_TRAINING:
        found.append(
            _warning(
                f"AWS names {', '.join(images.BUILTIN_TRAINING)} for the built-in algorithm, and not {family}; its "
                "image is old and may not run there"
            )
        )
    if way == "jumpstart" and options.instance_count > 1:
        found.append(_warning("JumpStart's scripts train on one machine; the others would be paid and do nothing"))
    if options.input_mode == "pipe" and way != "builtin":
        found.append(_error("input_mode=pipe is for the built-in algorithm only; choose file or fastfile"))
    if options.input_mode == "fastfile" and way == "builtin":
        found.append(_error("input_mode=fastfile is not for the built-in algorithm; choose file or pipe"))
    if options.input_mode == "pipe" and options.data_format == "json":
        found.append(_error("input_mode=pipe streams RecordIO or a manifest; choose data_format=recordio or manifest"))
    if options.spot and way == "jumpstart":
        found.append(_warning("JumpStart's scripts keep no checkpoints: a job that spot interrupts begins anew"))
    return found


def builtin_hosting(instance_type: str) -> list[Concern]:
    """Return whether AWS does not name a machine for answering with the built-in algorithm. Asks nobody."""
    family = images.family(instance_type)
    if family in images.BUILTIN_HOSTING:
        return []
    named = ", ".join(images.BUILTIN_HOSTING)
    return [_warning(f"AWS names {named} for the built-in algorithm's answers, and not {family}; it may not run there")]


def volume(options: SagemakerOptions, gigabytes: int, data_bytes: int, always_bytes: int = 0) -> list[Concern]:
    """Return whether the data that is copied to a machine is too much for its disk. Asks nobody.

    ``always_bytes`` are those of it that are copied whatever ``input_mode`` is.
    """
    room = _SHARE_OF_DISK * gigabytes * 1e9
    copied = data_bytes if options.input_mode == "file" else always_bytes
    if copied < room:
        return []
    helps = always_bytes < room
    return [
        _error(
            f"{copied / 1e9:.0f} GB of data do not fit on volume_size={gigabytes} GB beside the model and its "
            f"checkpoints; give more{', or input_mode=fastfile' if helps else ''}"
        )
    ]


def volume_key(options: AccountOptions, instance_type: str) -> list[Concern]:
    """Return whether a key is given that a machine's disks do not take, also one that answers. Asks nobody."""
    if options.volume_kms_key is None or not images.has_own_disks(instance_type):
        return []
    return [
        _warning(
            f"volume_kms_key is not sent: {instance_type} has disks of its own, encrypted with a key of the hardware"
        )
    ]


def builtin_data(
    params: BuiltinParams, channels: Mapping[str, Dataset], data_format: str, *, full_only: bool = False
) -> list[Concern]:
    """Return what of the data the built-in algorithm would refuse, in jobs that already cost money.

    Images without boxes are left out of RecordIO files, and with ``full_only`` of all, so they do not count there.
    """
    found = []
    if "validation" not in channels:
        found.append(
            _error("the built-in algorithm needs validation images; give some (val=), or data with a validation split")
        )
    parts = {name: channels[name] for name in _CHANNELS if name in channels}
    left_out = full_only or data_format == "recordio"
    for name, data in parts.items():
        empty = int((data.boxes_per_image() == 0).sum())
        if empty and not left_out:
            found.append(
                _warning(f"{name}: {empty} images without boxes; jobs have failed on such (AWS's examples, issue 643)")
            )
        odd = odd_images(data)
        found += _channels(name, odd, data_format)
        if data_format != "recordio":  # whose writer looks at all of them
            found += own_algorithm_data("the built-in algorithm", name, odd)
    train = channels["train"]
    samples = int((train.boxes_per_image() > 0).sum()) if left_out else len(train)
    found += _settings(params, parts, samples)
    unused = [name for name, count in train.boxes_per_class().items() if not count]
    if unused:
        found.append(_warning(f"no training image has a box of {', '.join(unused)}"))
    return found


def incremental(
    params: BuiltinParams, classes: Iterable[str], parent_native: Mapping[str, Any], parent_classes: Iterable[str]
) -> list[Concern]:
    """Return why training cannot go on from an earlier model of the built-in algorithm.

    ``parent_native`` are the hyperparameters that the parent was trained with, as they were sent. The service asks for
    an equal ``base_network`` and ``num_classes``; that the classes are the same ones, in order, it cannot know.
    """
    found = []
    theirs, ours = str(parent_native.get("base_network", params.base_network)), params.base_network
    if theirs != ours:
        found.append(_error(f"the earlier model has base_network={theirs}, and this one {ours}; write the same one"))
    return [*found, *same_classes("the built-in algorithm", classes, parent_classes)]


def same_classes(who: str, classes: Iterable[str], parent_classes: Iterable[str]) -> list[Concern]:
    """Return why an algorithm that has numbers for classes, and no names, cannot go on from an earlier model."""
    before, now = list(parent_classes), list(classes)
    if len(before) != len(now):
        return [
            _error(
                f"the earlier model has {len(before)} classes ({', '.join(before)}), and the data {len(now)} "
                f"({', '.join(now)}); {who} goes on only with as many"
            )
        ]
    if before != now:
        return [
            _error(
                f"the earlier model has the classes {', '.join(before)}, and the data {', '.join(now)}, and what the "
                "model knows is by their order; name and order them the same"
            )
        ]
    return []


def _settings(params: BuiltinParams, parts: Mapping[str, Dataset], samples: int) -> list[Concern]:
    busiest = max(int(data.boxes_per_image().max(initial=0)) for data in parts.values())
    found = []
    try:
        hyperparameters(
            params,
            num_classes=len(parts["train"].classes),
            num_training_samples=samples,
            label_width=needed_label_width(busiest),
        )
    except DetkitError as error:
        found.append(_error(str(error)))
    if params.mini_batch_size > samples:
        found.append(
            _error(f"mini_batch_size={params.mini_batch_size} is more than the {samples} training images; choose less")
        )
    return found


def odd_images(data: Dataset) -> dict[Odd, list[str]]:
    """Return the ids of images whose files AWS's own algorithms may not read, or not as they are displayed, by why."""
    found: dict[Odd, list[str]] = {}
    for path, image_id in zip(data.paths, data.image_ids, strict=True):
        for why in _odd(path):
            found.setdefault(why, []).append(image_id)
    return found


def own_algorithm_data(who: str, name: str, odd: Mapping[Odd, Sequence[str]]) -> Iterator[Concern]:
    """Yield what an algorithm of AWS would read otherwise than it is displayed, or not at all, in files as they are."""
    if turned := odd.get("turned"):
        yield _error(
            f"{name}: EXIF turns {_some(turned)}, and {who} may not turn them, so that boxes would lie elsewhere; turn "
            "the pixels themselves, for example with ImageMagick's `mogrify -auto-orient`"
        )
    if others := odd.get("format"):
        yield _error(
            f"{name}: {_some(others)} are neither JPEG nor PNG, and {who} is known to read no others; convert them"
        )


def _channels(name: str, odd: Mapping[Odd, Sequence[str]], data_format: str) -> Iterator[Concern]:
    """The documentation of the built-in algorithm knows images of three channels only."""
    if "channels" not in odd:
        return
    told = (
        f"{name}: {_some(odd['channels'])} have not three channels, and AWS documents no others for the built-in "
        "algorithm"
    )
    if data_format == "recordio":
        yield _warning(f"{told}; MXNet's reader is known to make grey ones RGB")
    else:
        yield _error(f"{told}; save them as RGB, or choose data_format=recordio")


def _some(image_ids: Sequence[str]) -> str:
    return f"{len(image_ids)} images, like {', '.join(image_ids[:_SHOWN])},"


def _odd(path: str) -> Iterator[Odd]:
    """Look at an image's header; a palette counts as three channels."""
    if read_header(path).orientation != 1:
        yield "turned"
    try:
        with PillowImage.open(path if packed(path) is None else io.BytesIO(read_bytes(path))) as image:
            if image.mode != "P" and len(image.getbands()) != 3:
                yield "channels"
            if image.format not in READ_BY_AWS:
                yield "format"
    except OSError as error:
        raise ImageError(path, str(error)) from error


def _quota(name: str, value: float | None, needed: int) -> Concern | None:
    if value is None:
        return _warning(f"there is no quota {name!r} in this region; SageMaker may not have that machine there")
    if value < needed:
        return _error(
            f"the quota {name!r} is {value:g}, and {needed} are needed; ask for more in the console of Service Quotas "
            "(SageMaker), which may take days, or choose another instance_type"
        )
    return None


def _quotas(aws: Aws, wanted: set[str]) -> dict[str, float]:
    """There are thousands, and their codes are not the same everywhere, so the list is read until all are found."""
    found: dict[str, float] = {}
    pages = aws.client("service-quotas").get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    for page in pages:
        found |= {quota["QuotaName"]: quota["Value"] for quota in page["Quotas"] if quota["QuotaName"] in wanted}
        if len(found) == len(wanted):
            break
    return found


def _trusts(policy: Any) -> bool:
    statements = policy.get("Statement", []) if isinstance(policy, Mapping) else []
    for statement in [statements] if isinstance(statements, Mapping) else statements:
        principal = statement.get("Principal")
        services = principal.get("Service", []) if isinstance(principal, Mapping) else principal
        services = [services] if isinstance(services, str) else services or []
        if statement.get("Effect") == "Allow" and (_TRUSTED in services or "*" in services):
            return True
    return False


def _looked_at(look: Callable[[], list[Concern]], what: str, missing: Concern | None) -> list[Concern]:
    """Do one check; ``missing`` is what to say of something that is not there."""
    try:
        return look()
    except AccessDenied as error:
        if error.code == "403" and what.startswith("bucket"):
            return [_error(f"{what} belongs to somebody else, or the credentials may not use it; choose another")]
        return [_warning(f"{what} was not looked at: {error}")]
    except AwsError as error:
        if missing is not None and error.code in _MISSING:
            return [missing]
        if error.code in {"301", "PermanentRedirect"}:
            return [_error(f"{what} is in another region than the job; both have to be in one region")]
        raise


def _error(message: str) -> Concern:
    return Concern(level="error", message=message)


def _warning(message: str) -> Concern:
    return Concern(level="warning", message=message)
