"""JumpStart: what the public hub says of a model, and what a training job of it needs. One call, DescribeHubContent.

Defaults, limits, images, metrics and S3 addresses are read from the hub's document every time; none is written here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from detkit.errors import InvalidValue, UnknownName, Unsupported, UsageError
from detkit.plans import Concern
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.images import family
from detkit_sagemaker.models import JUMPSTART, JumpstartParams, refuse_without_weights
from detkit_sagemaker.requests import Channel

HUB = "SageMakerPublicHub"
MODEL_CONTENT = "application/x-sagemaker-model"
"""Content type of the channel that holds the weights to start from."""

_NOT_FOUND = {"ResourceNotFound", "ResourceNotFoundException"}
_SCRIPT = "transfer_learning.py"
_CODE_THERE = "/opt/ml/input/data/code/sourcedir.tar.gz"
_LOG_LEVEL = "20"  # logging.INFO

_NAMES: Mapping[str, tuple[str, ...]] = {
    "epochs": ("epochs", "epoch", "num_epochs", "num-epochs"),
    "learning_rate": ("adam-learning-rate", "learning-rate", "learning_rate", "lr"),
    "batch_size": ("batch-size", "batch_size", "train_batch_size", "per_device_train_batch_size"),
}
"""What JumpStart's scripts call detkit's parameters; the first that a document lists is taken."""


class Hyperparameter(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """A hyperparameter as a hub's document has it."""

    name: str
    type: str = "text"
    default: Any = None
    min: float | None = None
    max: float | None = None
    exclusive_min: float | None = None
    exclusive_max: float | None = None
    options: list[Any] | None = None
    scope: str = "algorithm"

    def check(self, value: str) -> str:
        """Return a value, as text, if it is within the limits. Raises `InvalidValue`."""
        if self.type in ("int", "float"):
            self._check_number(value)
        elif self.type == "bool" and value.lower() not in ("true", "false"):
            raise InvalidValue(self.name, value, "true or false")
        if self.options is not None and value not in map(str, self.options):
            raise InvalidValue(self.name, value, f"one of {', '.join(map(str, self.options))}")
        return value

    def _check_number(self, value: str) -> None:
        try:
            number = int(value) if self.type == "int" else float(value)
        except ValueError:
            raise InvalidValue(self.name, value, "a whole number" if self.type == "int" else "a number") from None
        limits = (
            (self.min, number >= (self.min or 0), "at least"),
            (self.max, number <= (self.max or 0), "at most"),
            (self.exclusive_min, number > (self.exclusive_min or 0), "more than"),
            (self.exclusive_max, number < (self.exclusive_max or 0), "less than"),
        )
        for limit, kept, words in limits:
            if limit is not None and not kept:
                raise InvalidValue(self.name, value, f"{words} {limit:g}, as the hub says")


class Metric(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """A metric and the expression that finds it in the log."""

    name: str
    regex: str


class Variable(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """An environment variable of the container that answers."""

    name: str
    default: Any = None


class Variants(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """What differs by machine: by its type or its family; ``$name`` stands for an alias."""

    aliases: dict[str, str] = {}
    variants: dict[str, dict[str, Any]] = {}

    def of(self, instance_type: str, name: str) -> Any:
        """Return a property of a machine, its type before its family; None where it has none."""
        for key in (instance_type, family(instance_type)):
            entry = self.variants.get(key) or {}
            for kind in ("Properties", "RegionalProperties"):
                value = (entry.get(kind) or {}).get(name)
                if isinstance(value, str) and value.startswith("$"):
                    value = self.aliases.get(value[1:])
                if value:
                    return value
        return None


class HubModel(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """The fields of a hub's document that training and answering need."""

    training_supported: bool = False
    incremental_training_supported: bool = False
    training_ecr_uri: str | None = None
    training_artifact_uri: str | None = None
    training_script_uri: str | None = None
    training_prepacked_script_uri: str | None = None
    training_instance_type_variants: Variants = Variants()
    hyperparameters: list[Hyperparameter] = []
    training_metrics: list[Metric] = []
    default_training_instance_type: str | None = None
    supported_training_instance_types: list[str] = []
    training_volume_size: int | None = None
    training_enable_network_isolation: bool = False
    encrypt_inter_container_traffic: bool = False
    hosting_ecr_uri: str | None = None
    hosting_script_uri: str | None = None
    hosting_use_script_uri: bool = True
    hosting_instance_type_variants: Variants = Variants()
    inference_environment_variables: list[Variable] = []
    default_inference_instance_type: str | None = None
    supported_inference_instance_types: list[str] = []
    inference_enable_network_isolation: bool = False
    gated_bucket: bool = False
    model_id: str = msgspec.field(default="", name="detkit:model_id")
    version: str = msgspec.field(default="", name="detkit:version")
    region: str = msgspec.field(default="", name="detkit:region")

    @classmethod
    def read(cls, aws: Aws, model_id: str, version: str = "") -> HubModel:
        """Ask the public hub for a model, the newest where no version is named.

        Raises `UnknownName` with close ones, and `AwsError`.
        """
        try:
            with explained(f"asking JumpStart for {model_id} (sagemaker:DescribeHubContent)"):
                answer = aws.client("sagemaker").describe_hub_content(
                    HubName=HUB,
                    HubContentType="Model",
                    HubContentName=model_id,
                    **({"HubContentVersion": version} if version else {}),
                )
        except AwsError as error:
            if error.code not in _NOT_FOUND:
                raise
            raise _unknown(aws, model_id) from error
        document, version = answer["HubContentDocument"], answer.get("HubContentVersion", "")
        return cls.decode(document, model_id, version=version, region=aws.region)

    @classmethod
    def decode(cls, document: str | bytes, model_id: str, *, version: str = "", region: str = "") -> HubModel:
        """Read a hub's document, where null is as good as nothing. Raises `Unsupported` for one that is no such."""
        try:
            content = _without_nulls(msgspec.json.decode(document))
            model = msgspec.convert(content, type=cls, strict=False)  # limits are numbers in some, text in others
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Unsupported(
                f"what JumpStart says of {model_id} cannot be read: {error}; it may be of a newer kind than this detkit"
            ) from None
        return msgspec.structs.replace(model, model_id=model_id, version=version, region=region)

    def require_training(self) -> None:
        """Raise `Unsupported` unless the model can be fine-tuned, by everybody."""
        if not self.training_supported or self.training_script_uri is None:
            raise Unsupported(
                f"JumpStart's {self.model_id} can be used but not trained; `detkit models --backend sagemaker` lists "
                "those that can"
            )
        if self.gated_bucket:
            raise Unsupported(
                f"JumpStart's {self.model_id} lies in a bucket that is opened only to those who accept its licence, "
                "which detkit does not do for you; choose another model"
            )

    def training_instance(self, wanted: str | None) -> str:
        """Return the machine to train on: the one wanted, else the hub's default. Raises `InvalidValue`."""
        supported = self.supported_training_instance_types
        chosen = wanted or self.default_training_instance_type
        if chosen is None or (supported and chosen not in supported):
            raise InvalidValue("instance_type", chosen, f"one of {', '.join(supported)}, as JumpStart's hub says")
        return chosen

    def training_image(self, instance_type: str) -> str:
        """Return the image that trains on a machine. Raises `Unsupported`."""
        image = self.training_instance_type_variants.of(instance_type, "ImageUri") or self.training_ecr_uri
        if not image:
            raise Unsupported(f"JumpStart names no image that trains {self.model_id} on {instance_type}")
        return str(image)

    def hosting_image(self, instance_type: str) -> str:
        """Return the image that answers on a machine. Raises `Unsupported`."""
        image = self.hosting_instance_type_variants.of(instance_type, "ImageUri") or self.hosting_ecr_uri
        if not image:
            raise Unsupported(f"JumpStart names no image that answers for {self.model_id} on {instance_type}")
        return str(image)

    def hosting_concerns(self, instance_type: str) -> list[Concern]:
        """Return whether JumpStart does not name a machine for answering. Asks nobody."""
        named = self.supported_inference_instance_types
        if not named or instance_type in named:
            return []
        message = f"JumpStart names {', '.join(named)} for answers of {self.model_id}, and not {instance_type}"
        return [Concern(level="warning", message=f"{message}; it may not run there")]

    def hosting_environment(self) -> dict[str, str]:
        """Return the environment of a container that answers with a model trained from this one.

        Where the hub says that the script lies beside the model, it is named where it lies: the archive that training
        leaves does not hold it. Whether the image then fetches it only a real account can show.
        """
        values = {v.name: str(v.default) for v in self.inference_environment_variables if v.default is not None}
        if self.hosting_use_script_uri and self.hosting_script_uri:
            values["SAGEMAKER_SUBMIT_DIRECTORY"] = self.hosting_script_uri
        return {**values, "SAGEMAKER_REGION": self.region}

    def channels(self, training_uri: str, *, parent_uri: str | None = None, isolated: bool) -> list[Channel]:
        """Return the channels of a job: the data, the weights it starts from, and in isolation the script.

        ``training_uri`` is the folder of ``images/`` and ``annotations.json``; ``parent_uri`` the ``model.tar.gz`` of
        an earlier job of this model. Raises `Unsupported` where the hub has no weights or takes none of the user's.
        """
        if parent_uri is not None and not self.incremental_training_supported:
            raise Unsupported(f"JumpStart's {self.model_id} cannot go on from an earlier model; leave weights= out")
        artifact = parent_uri or self.training_artifact_uri
        channels = [Channel(name="training", s3_uri=training_uri.rstrip("/") + "/")]
        if artifact:
            channels.append(Channel(name="model", s3_uri=artifact, content_type=MODEL_CONTENT, input_mode="File"))
        if isolated:
            channels.append(Channel(name="code", s3_uri=self._script(), input_mode="File"))
        return channels

    def _script(self) -> str:
        self.require_training()
        assert self.training_script_uri is not None
        return self.training_script_uri

    def wire(self, params: JumpstartParams, *, job_name: str, region: str, isolated: bool) -> dict[str, str]:
        """Return the hyperparameters as they are sent, each the JSON of a text.

        Everything that the document lists is sent, with its own default where nothing was said. Raises `UnknownName`,
        `InvalidValue` and `UsageError`.
        """
        values = {**self._defaults(), **self.chosen(params)}
        container = {h.name: str(h.default) for h in self.hyperparameters if h.scope == "container" and _has(h)}
        own = {
            "sagemaker_program": container.get("sagemaker_program", _SCRIPT),
            "sagemaker_container_log_level": container.get("sagemaker_container_log_level", _LOG_LEVEL),
            "sagemaker_submit_directory": _CODE_THERE if isolated else self._script(),
            "sagemaker_job_name": job_name,
            "sagemaker_region": region,
        }
        encoded = {name: json.dumps(value) for name, value in {**values, **container, **own}.items()}
        encoded["sagemaker_container_log_level"] = own["sagemaker_container_log_level"]  # a number, in no quotes
        return encoded

    def chosen(self, params: JumpstartParams) -> dict[str, str]:
        """Return what the user has set, by the document's names."""
        refuse_without_weights(self.model_id, params)
        known = {h.name: h for h in self.hyperparameters if h.scope != "container"}
        values: dict[str, str] = {}
        for name in _NAMES:
            value = getattr(params, name)
            if value is not None:
                native, text = self.native(name, value)
                values[native] = text
        for name, text in params.hyperparameters.items():
            if name not in known:
                raise UnknownName(f"hyperparameter of {JUMPSTART}{self.model_id}", name, known)
            if name in values:
                raise UsageError(f"{name} is given twice: by its own name in hyperparameters= and by detkit's")
            values[name] = known[name].check(text)
        return values

    def native(self, name: str, value: float) -> tuple[str, str]:
        """Return the document's name of one of detkit's parameters, and the value as text.

        Raises `UsageError` where it lists none such, and `InvalidValue` for a value outside its limits.
        """
        found = self.listed(name)
        if found is None:
            names = ", ".join(h.name for h in self.hyperparameters if h.scope != "container")
            raise UsageError(f"{JUMPSTART}{self.model_id} has no hyperparameter for {name}; it lists {names}")
        return found.name, found.check(_number(value))

    def listed(self, name: str) -> Hyperparameter | None:
        """Return what the document says of one of detkit's parameters; None where it lists none such."""
        known = {h.name: h for h in self.hyperparameters if h.scope != "container"}
        return next((known[one] for one in _NAMES.get(name, ()) if one in known), None)

    def _defaults(self) -> dict[str, str]:
        return {h.name: str(h.default) for h in self.hyperparameters if h.scope != "container" and _has(h)}

    @property
    def metrics(self) -> dict[str, str]:
        """The expressions of the metrics, by name."""
        return {metric.name: metric.regex for metric in self.training_metrics}

    @property
    def tags(self) -> dict[str, str]:
        """The tags by which AWS's own SDK knows a job of JumpStart again."""
        return {
            "sagemaker-sdk:jumpstart-model-id": self.model_id,
            "sagemaker-sdk:jumpstart-model-version": self.version or "*",
        }


def list_models(aws: Aws, contains: str = "-od") -> list[str]:
    """Return the ids of the hub's models whose names contain a text, all pages of them."""
    found: list[str] = []
    page: dict[str, str] = {}
    with explained("listing JumpStart's models (sagemaker:ListHubContents)"):
        while True:
            answer = aws.client("sagemaker").list_hub_contents(
                HubName=HUB, HubContentType="Model", NameContains=contains, **page
            )
            found += [summary["HubContentName"] for summary in answer["HubContentSummaries"]]
            if not answer.get("NextToken"):
                return sorted(found)
            page = {"NextToken": answer["NextToken"]}


def _unknown(aws: Aws, model_id: str) -> UnknownName:
    try:
        known: Sequence[str] = list_models(aws)
        hint = ""
    except AwsError as error:
        known, hint = (), str(error)
    close = difflib.get_close_matches(model_id, known, n=8, cutoff=0.5) or list(known)[:20]
    return UnknownName(f"model in JumpStart's hub in {aws.region}", model_id, close, hint)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _has(hyperparameter: Hyperparameter) -> bool:
    return hyperparameter.default is not None


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(value)
