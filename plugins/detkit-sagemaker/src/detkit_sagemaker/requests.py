"""The requests that create something in SageMaker, exactly as they are sent, and a check of them without AWS.

Everything here is pure: no credentials, no network. The check is against the service model that botocore ships.
"""

from __future__ import annotations

import functools
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from detkit.errors import InvalidValue, UsageError
from detkit_sagemaker.images import has_own_disks
from detkit_sagemaker.options import AccountOptions, DeployOptions, SagemakerOptions, TransformOptions

Request = dict[str, Any]

MODES = {"file": "File", "fastfile": "FastFile", "pipe": "Pipe"}
"""What the service calls each ``input_mode``."""

LARGEST_TRANSFORM_MB = 100
"""``MaxConcurrentTransforms * MaxPayloadInMB`` may not exceed it (API reference, CreateTransformJob)."""

_NAME_LENGTH = 63
_TUNING_NAME_LENGTH = 32
_SHORTEST_SEARCH = 120
"""Seconds: the least ``MaxRuntimeInSeconds`` of a tuning job (API reference, ResourceLimits)."""
_CHECKPOINTS = "/opt/ml/checkpoints"
_OF_ONE_JOB = ("TrainingJobName", "HyperParameters", "Tags")
"""What the definition of a tuning job's training jobs has no place for."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One input of a training job."""

    name: str
    s3_uri: str
    content_type: str | None = None
    input_mode: Literal["File", "FastFile", "Pipe"] | None = None
    """The job's own where None."""
    data_type: Literal["S3Prefix", "ManifestFile", "AugmentedManifestFile"] = "S3Prefix"
    compression: Literal["None", "Gzip"] | None = None
    record_wrapper: Literal["None", "RecordIO"] | None = None
    attribute_names: Sequence[str] = ()
    """The keys of an augmented manifest that are streamed, in this order."""
    distribution: Literal["FullyReplicated", "ShardedByS3Key"] = "FullyReplicated"
    shuffle_seed: int | None = None
    """Of the order in which what is streamed comes, another one in each epoch; None for the order of the files."""

    def request(self) -> Request:
        """Return the entry of ``InputDataConfig``."""
        source: Request = {
            "S3DataType": self.data_type,
            "S3Uri": self.s3_uri,
            "S3DataDistributionType": self.distribution,
        }
        if self.attribute_names:
            source["AttributeNames"] = list(self.attribute_names)
        beside = {
            "ContentType": self.content_type,
            "CompressionType": self.compression,
            "RecordWrapperType": self.record_wrapper,
            "InputMode": self.input_mode,
            "ShuffleConfig": None if self.shuffle_seed is None else {"Seed": self.shuffle_seed},
        }
        return {"ChannelName": self.name, "DataSource": {"S3DataSource": source}, **_given(beside)}


def job_name(run_name: str) -> str:
    """Return a new name that AWS takes, of at most 63 characters: ``detkit-<run name>-<8 hex digits>``."""
    return f"detkit-{_cleaned(run_name, _NAME_LENGTH - 16)}-{secrets.token_hex(4)}"


def tuning_name(study: str) -> str:
    """Return a new name for a tuning job, of at most 32 characters: ``detkit-<study's name>-<8 hex digits>``."""
    return f"detkit-{_cleaned(study, _TUNING_NAME_LENGTH - 16)}-{secrets.token_hex(4)}"


def _cleaned(name: str, length: int) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:length].strip("-") or "run"


def training_request(
    *,
    name: str,
    image: str,
    role: str,
    output: str,
    channels: Sequence[Channel],
    options: SagemakerOptions,
    instance_type: str,
    hyperparameters: Mapping[str, str] | None = None,
    metrics: Mapping[str, str] | None = None,
    checkpoints: str | None = None,
    environment: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    isolated: bool = False,
    encrypted: bool = False,
    volume_size: int | None = None,
) -> Request:
    """Return the request of ``CreateTrainingJob``; it always has a limit on the time.

    ``role`` is an ARN; ``output`` and ``checkpoints`` are S3 folders; ``metrics`` are expressions by name; ``isolated``
    and ``encrypted`` are what the image or model asks for where the options do not say. ``volume_size`` is the
    gigabytes that the model asks for at least. Raises `UsageError`.
    """
    isolation = options.network_isolation if options.network_isolation is not None else isolated
    encryption = options.encrypt_traffic if options.encrypt_traffic is not None else encrypted
    algorithm: Request = {"TrainingImage": image, "TrainingInputMode": MODES[options.input_mode]}
    if metrics:
        algorithm["MetricDefinitions"] = [{"Name": n, "Regex": regex} for n, regex in metrics.items()]
    resources = {
        "InstanceType": instance_type,
        "InstanceCount": options.instance_count,
        "VolumeSizeInGB": max(options.volume_size, volume_size or 0),
        **_volume_key("VolumeKmsKeyId", options, instance_type),
    }
    request: Request = {
        "TrainingJobName": name,
        "AlgorithmSpecification": algorithm,
        "RoleArn": role,
        "InputDataConfig": [channel.request() for channel in channels],
        "OutputDataConfig": {"S3OutputPath": output, **_given({"KmsKeyId": options.kms_key})},
        "ResourceConfig": resources,
        "StoppingCondition": _stopping(options),
        "EnableNetworkIsolation": isolation,
        "EnableInterContainerTrafficEncryption": encryption,
        "EnableManagedSpotTraining": options.spot,
        "Tags": tag_list(options, tags),
        **_vpc(options),
    }
    if hyperparameters:
        request["HyperParameters"] = dict(hyperparameters)
    if environment:
        request["Environment"] = dict(environment)
    if checkpoints is not None:
        request["CheckpointConfig"] = {"S3Uri": checkpoints, "LocalPath": _CHECKPOINTS}
    return request


def tuning_request(
    *,
    name: str,
    training: Request,
    ranges: Request,
    strategy: Literal["Bayesian", "Random", "Hyperband", "Grid"],
    objective: str,
    mode: Literal["max", "min"],
    trials: int,
    parallel: int,
    early_stopping: bool,
    seed: int,
    budget_s: float | None = None,
    epochs: int | None = None,
    warm_start: Request | None = None,
) -> Request:
    """Return the request of ``CreateHyperParameterTuningJob`` whose training jobs are like ``training``.

    What ``ranges`` name is left out of their hyperparameters. ``epochs`` are what Hyperband may use for one of them.
    """
    limits = {"MaxParallelTrainingJobs": parallel}
    if strategy != "Grid":  # there the categories say how many
        limits["MaxNumberOfTrainingJobs"] = trials
    if budget_s is not None:
        limits["MaxRuntimeInSeconds"] = max(_SHORTEST_SEARCH, math.ceil(budget_s))
    config: Request = {
        "Strategy": strategy,
        "HyperParameterTuningJobObjective": {"Type": {"max": "Maximize", "min": "Minimize"}[mode]},
        "ResourceLimits": limits,
        "ParameterRanges": ranges,
        "TrainingJobEarlyStoppingType": "Auto" if early_stopping and strategy != "Hyperband" else "Off",
        "RandomSeed": seed,
    }
    config["HyperParameterTuningJobObjective"]["MetricName"] = objective
    if epochs is not None:
        config["StrategyConfig"] = {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": epochs}}
    tuned = {one["Name"] for kind in ranges.values() for one in kind}
    fixed = {name: text for name, text in training.get("HyperParameters", {}).items() if name not in tuned}
    definition = {key: value for key, value in training.items() if key not in _OF_ONE_JOB}
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": config,
        "TrainingJobDefinition": {**definition, **({"StaticHyperParameters": fixed} if fixed else {})},
        "Tags": training["Tags"],
        **({"WarmStartConfig": warm_start} if warm_start else {}),
    }


def _stopping(options: SagemakerOptions) -> Request:
    condition = {"MaxRuntimeInSeconds": options.max_runtime}
    if options.spot:
        wait = options.max_wait if options.max_wait is not None else 2 * options.max_runtime
        if wait < options.max_runtime:
            raise InvalidValue(
                "max_wait", wait, f"at least max_runtime, {options.max_runtime} s: it counts waiting and running"
            )
        condition["MaxWaitTimeInSeconds"] = wait
    elif options.max_wait is not None:
        raise InvalidValue("max_wait", options.max_wait, "only with spot=True")
    return condition


def model_request(
    *,
    name: str,
    image: str,
    role: str,
    model_data: str | None,
    options: AccountOptions,
    environment: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    isolated: bool = False,
) -> Request:
    """Return the request of ``CreateModel``; ``model_data`` is the S3 address of a ``model.tar.gz``."""
    container: Request = {"Image": image, "Mode": "SingleModel", **_given({"ModelDataUrl": model_data})}
    if environment:
        container["Environment"] = dict(environment)
    return {
        "ModelName": name,
        "PrimaryContainer": container,
        "ExecutionRoleArn": role,
        "EnableNetworkIsolation": options.network_isolation if options.network_isolation is not None else isolated,
        "Tags": tag_list(options, tags),
        **_vpc(options),
    }


def transform_request(
    *,
    name: str,
    model: str,
    input_uri: str,
    output: str,
    options: TransformOptions,
    content_type: str = "application/x-image",
    accept: str | None = None,
    data_type: Literal["S3Prefix", "ManifestFile"] = "S3Prefix",
    environment: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Request:
    """Return the request of ``CreateTransformJob``: one call of the container for each image. Raises `InvalidValue`."""
    if options.concurrency * options.max_payload > LARGEST_TRANSFORM_MB:
        raise InvalidValue(
            "concurrency",
            options.concurrency,
            f"at most {LARGEST_TRANSFORM_MB // options.max_payload} with max_payload={options.max_payload}: together "
            f"at most {LARGEST_TRANSFORM_MB} MB",
        )
    request: Request = {
        "TransformJobName": name,
        "ModelName": model,
        "MaxConcurrentTransforms": options.concurrency,
        "MaxPayloadInMB": options.max_payload,
        "BatchStrategy": "SingleRecord",
        "TransformInput": {
            "DataSource": {"S3DataSource": {"S3DataType": data_type, "S3Uri": input_uri}},
            "ContentType": content_type,
            "CompressionType": "None",
            "SplitType": "None",
        },
        "TransformOutput": {
            "S3OutputPath": output,
            "AssembleWith": "None",
            **_given({"Accept": accept, "KmsKeyId": options.kms_key}),
        },
        "TransformResources": {
            "InstanceType": options.instance_type,
            "InstanceCount": options.instance_count,
            **_volume_key("VolumeKmsKeyId", options, options.instance_type),
        },
        "Tags": tag_list(options, tags),
    }
    if environment:
        request["Environment"] = dict(environment)
    return request


def endpoint_config_request(
    *, name: str, model: str, options: DeployOptions, tags: Mapping[str, str] | None = None
) -> Request:
    """Return the request of ``CreateEndpointConfig``, with one variant."""
    variant: Request = {"VariantName": "all", "ModelName": model}
    if options.serverless:
        variant["ServerlessConfig"] = {"MemorySizeInMB": options.memory_size, "MaxConcurrency": options.concurrency}
        key: Request = {}
    else:
        variant |= {"InstanceType": options.instance_type, "InitialInstanceCount": options.instance_count}
        key = _volume_key("KmsKeyId", options, options.instance_type)
    return {"EndpointConfigName": name, "ProductionVariants": [variant], "Tags": tag_list(options, tags), **key}


def endpoint_request(
    *, name: str, config: str, options: DeployOptions, tags: Mapping[str, str] | None = None
) -> Request:
    """Return the request of ``CreateEndpoint``."""
    return {"EndpointName": name, "EndpointConfigName": config, "Tags": tag_list(options, tags)}


def tag_list(options: AccountOptions, tags: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """Return the user's tags and detkit's own, ``tags``, as AWS writes them. Raises `InvalidValue`."""
    reserved = [name for name in options.tags if name.startswith(("aws:", "detkit:"))]
    if reserved:
        raise InvalidValue("tags", reserved[0], "a name that does not begin with aws: or detkit:")
    return [{"Key": name, "Value": _tag_value(value)} for name, value in {**options.tags, **(tags or {})}.items()]


def _tag_value(value: str) -> str:
    """Replace what AWS does not take in the value of a tag: anything but letters, digits, spaces and ``_.:/=+-@``."""
    return re.sub(r"[^\w\s.:/=+\-@]", "_", value)[:256]


def _vpc(options: AccountOptions) -> Request:
    if not options.subnets and not options.security_groups:
        return {}
    if not options.subnets or not options.security_groups:
        raise UsageError("subnets and security_groups belong together; give both, or neither")
    return {"VpcConfig": {"Subnets": list(options.subnets), "SecurityGroupIds": list(options.security_groups)}}


def _volume_key(name: str, options: AccountOptions, instance_type: str) -> Request:
    """Types with disks of their own take no key; `detkit_sagemaker.preflight` tells."""
    return {} if has_own_disks(instance_type) else _given({name: options.volume_kms_key})


def _given(values: Request) -> Request:
    return {name: value for name, value in values.items() if value is not None}


def check_request(operation: str, request: Mapping[str, Any], service: str = "sagemaker") -> list[str]:
    """Return what is wrong with a request by the service's own model: names, types, lengths, patterns, words.

    botocore itself looks at neither patterns nor words before it sends. Nothing is sent.
    """
    from botocore.validate import ParamValidator

    shape = _service_model(service).operation_model(operation).input_shape
    if shape is None:
        return []
    report = ParamValidator().validate(dict(request), shape)
    if report.has_errors():
        return report.generate_report().splitlines()  # type: ignore[no-any-return]
    return list(_violations(shape, request, ""))


@functools.cache
def _service_model(service: str) -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model(service)


def _violations(shape: Any, value: Any, place: str) -> Iterator[str]:
    """Walk a valid request for what `ParamValidator` does not check."""
    rules, kind = shape.metadata, shape.type_name
    if kind == "structure":
        for name, member in shape.members.items():
            if name in value:
                yield from _violations(member, value[name], f"{place}.{name}" if place else name)
        return
    if kind in ("list", "map", "string") and not rules.get("min", 0) <= len(value) <= rules.get("max", len(value)):
        yield f"{place}: {len(value)} long; at least {rules.get('min', 0)} and at most {rules.get('max', 'any')}"
    elif kind in ("integer", "long", "float", "double") and value > rules.get("max", value):
        yield f"{place}: {value}; at most {rules['max']}"
    if kind == "list":
        for index, item in enumerate(value):
            yield from _violations(shape.member, item, f"{place}[{index}]")
    elif kind == "map":
        for key, item in value.items():
            yield from _violations(shape.key, key, f"{place} (name {key!r})")
            yield from _violations(shape.value, item, f"{place}[{key!r}]")
    elif kind == "string":
        if "enum" in rules and value not in rules["enum"]:
            yield f"{place}: {value!r} is none of the words it takes"
        elif "pattern" in rules and not _matches(rules["pattern"], value):
            yield f"{place}: {value!r} does not match {rules['pattern']}"


def _matches(pattern: str, value: str) -> bool:
    """Match as the service does, as a whole; Unicode's classes are written as the nearest ones of Python."""
    for theirs, ours in ((r"\p{L}", r"\w"), (r"\p{N}", r"\w"), (r"\p{Z}", r"\s")):
        pattern = pattern.replace(theirs, ours)
    return re.fullmatch(pattern, value, re.ASCII if r"\w" not in pattern else 0) is not None
