"""The defaults file of the SageMaker Python SDK: the role, VPC and keys that administrator and user have set there.

Two files are read, the administrator's and then the user's, whose values count. Each lies where the SDK looks for it,
or where ``SAGEMAKER_ADMIN_CONFIG_OVERRIDE`` and ``SAGEMAKER_USER_CONFIG_OVERRIDE`` say. What an option of detkit's own
says counts before both. Nothing is fetched, and nothing is sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from detkit.errors import InvalidData, InvalidValue, UsageError
from detkit.params import set_fields
from detkit.settings import Setting
from detkit_sagemaker.options import AccountOptions, DeployOptions, SagemakerOptions, TransformOptions

ADMIN_VARIABLE = "SAGEMAKER_ADMIN_CONFIG_OVERRIDE"
USER_VARIABLE = "SAGEMAKER_USER_CONFIG_OVERRIDE"
SCHEMA = "1.0"

_FILE = "config.yaml"
_SESSION = ("PythonSDK", "Modules", "Session")
_BUCKET, _PREFIX = (*_SESSION, "DefaultS3Bucket"), (*_SESSION, "DefaultS3ObjectKeyPrefix")

_MODEL: Mapping[str, tuple[str, ...]] = {
    "role": ("Model", "ExecutionRoleArn"),
    "subnets": ("Model", "VpcConfig", "Subnets"),
    "security_groups": ("Model", "VpcConfig", "SecurityGroupIds"),
    "network_isolation": ("Model", "EnableNetworkIsolation"),
}

_PLACES: Mapping[type[AccountOptions], Mapping[str, tuple[str, ...]]] = {
    SagemakerOptions: {
        "role": ("TrainingJob", "RoleArn"),
        "subnets": ("TrainingJob", "VpcConfig", "Subnets"),
        "security_groups": ("TrainingJob", "VpcConfig", "SecurityGroupIds"),
        "network_isolation": ("TrainingJob", "EnableNetworkIsolation"),
        "encrypt_traffic": ("TrainingJob", "EnableInterContainerTrafficEncryption"),
        "kms_key": ("TrainingJob", "OutputDataConfig", "KmsKeyId"),
        "volume_kms_key": ("TrainingJob", "ResourceConfig", "VolumeKmsKeyId"),
        "tags": ("TrainingJob", "Tags"),
    },
    TransformOptions: {
        **_MODEL,
        "kms_key": ("TransformJob", "TransformOutput", "KmsKeyId"),
        "volume_kms_key": ("TransformJob", "TransformResources", "VolumeKmsKeyId"),
        "tags": ("TransformJob", "Tags"),
    },
    DeployOptions: {
        **_MODEL,
        "volume_kms_key": ("EndpointConfig", "KmsKeyId"),
        "tags": ("EndpointConfig", "Tags"),
    },
}
"""Where in the file each option is looked for."""

OptionsT = TypeVar("OptionsT", bound=AccountOptions)


@dataclass(frozen=True, kw_only=True)
class Completed:
    """Options with what the files say where nobody else has said anything."""

    origins: Mapping[str, str]
    """The file of each option that came from one."""
    unused: tuple[str, ...]
    """What the files say of such a job and detkit does not take over."""

    def notes(self) -> tuple[str, ...]:
        """Return what to tell in the plan."""
        told = [f"{name} from {file}" for name, file in self.origins.items()]
        if self.unused:
            told.append(f"the SageMaker defaults file also sets {', '.join(self.unused)}, which detkit does not use")
        return tuple(told)


def complete(options: OptionsT) -> tuple[OptionsT, Completed]:
    """Fill in from the defaults files what an option has no value of. Raises `UsageError` for a broken file."""
    found = _read_all(_PLACES[type(options)])
    given = msgspec.structs.asdict(options)
    missing = {name: setting for name, setting in found.items() if name in given and not _is_given(name, given)}
    if options.subnets or options.security_groups:  # half of one network and half of another is neither
        missing = {name: s for name, s in missing.items() if name not in ("subnets", "security_groups")}
    values = {name: setting.value for name, setting in missing.items()}
    if "tags" in found:  # tags add up
        values["tags"] = {**found["tags"].value, **options.tags}
        missing["tags"] = found["tags"]
    origins = {name: missing[name].origin for name in values}
    completed = set_fields(options, values, kind="option", origins=origins)
    return completed, Completed(origins=origins, unused=tuple(_unused(type(options))))


def role_arn(role: str, *, partition: str, account: str) -> str:
    """Return the ARN of a role that is given by its name or, as it is, its ARN."""
    return role if role.startswith("arn:") else f"arn:{partition}:iam::{account}:role/{role.lstrip('/')}"


def files() -> list[Path]:
    """Return the defaults files that are there, the weakest first. Raises `UsageError` for a named one that is not."""
    places = [_named(ADMIN_VARIABLE) or _site_folder() / _FILE, _named(USER_VARIABLE) or _user_folder() / _FILE]
    return [place for place in places if place.is_file()]


def _is_given(name: str, given: Mapping[str, Any]) -> bool:
    return given[name] not in (None, (), {})


def _read_all(places: Mapping[str, tuple[str, ...]]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for file in files():
        content = _read(file)
        for name, path in places.items():
            value = _look_up(content, path)
            if value is not None:
                found[name] = Setting(_tags(value, file) if name == "tags" else value, str(file))
        bucket = _look_up(content, _BUCKET)
        if bucket is not None:
            prefix = str(_look_up(content, _PREFIX) or "").strip("/")
            found["output"] = Setting("/".join(filter(None, [f"s3://{bucket}", prefix, "detkit"])), str(file))
    return found


def _unused(kind: type[AccountOptions]) -> Iterator[str]:
    """Name what the files say of this kind of job that is not in `_PLACES`."""
    known = set(_PLACES[kind].values())
    for section in sorted({path[0] for path in known}):
        for file in files():
            for path in _leaves(_read(file).get(section), (section,)):
                if not any(path[: len(one)] == one for one in known):
                    yield ".".join(path)


def _leaves(content: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, (*path, str(name)))
    elif content is not None:
        yield path


def _look_up(content: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(content, dict):
            return None
        content = content.get(name)
    return content


def _read(file: Path) -> dict[str, Any]:
    """Return the ``SageMaker`` section of a file."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidData(f"the SageMaker defaults file {file} cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidValue(str(file), type(content).__name__, "a mapping with SchemaVersion and SageMaker")
    version = content.get("SchemaVersion")
    if str(version) != SCHEMA:
        raise InvalidValue("SchemaVersion", version, f"'{SCHEMA}'", str(file))
    section = content.get("SageMaker") or {}
    if not isinstance(section, dict):
        raise InvalidValue("SageMaker", type(section).__name__, "a mapping", str(file))
    return section


def _tags(value: Any, file: Path) -> dict[str, str]:
    try:
        return {tag["Key"]: tag["Value"] for tag in msgspec.convert(value, list[dict[str, str]], strict=False)}
    except (msgspec.ValidationError, KeyError):
        raise InvalidValue("Tags", value, "a list of mappings with Key and Value", str(file)) from None


def _named(variable: str) -> Path | None:
    """Return the file that a variable names, or the one in the folder that it names."""
    value = os.environ.get(variable)
    if not value:
        return None
    if value.startswith("s3://"):
        raise UsageError(
            f"{variable} names {value}; detkit reads defaults from this machine only. copy the file here, "
            f"`aws s3 cp {value} config.yaml`, and let {variable} name the copy"
        )
    path = Path(value).expanduser()
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{variable} names {value}, where there is no {_FILE}; name one that is there, or unset it")
    return path


def _user_folder() -> Path:
    """Where the SDK looks: as the XDG base directories, macOS and Windows have it."""
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/sagemaker"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "sagemaker/sagemaker"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "sagemaker"


def _site_folder() -> Path:
    if sys.platform == "darwin":
        return Path("/Library/Application Support/sagemaker")
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA") or "C:/ProgramData") / "sagemaker/sagemaker"
    return Path((os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)[0]) / "sagemaker"
