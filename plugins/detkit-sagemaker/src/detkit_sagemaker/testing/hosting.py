"""Models, endpoint configurations and endpoints: what is checked, listed and deleted, and invocations."""

from __future__ import annotations

import http.client
from collections.abc import Mapping

from detkit_sagemaker.testing.account import Account, Json, Resource
from detkit_sagemaker.testing.endpoint import Endpoint
from detkit_sagemaker.testing.listing import listed
from detkit_sagemaker.testing.model_server import Answer, container_of, model_data
from detkit_sagemaker.testing.refusals import NotFound, Refused
from detkit_sagemaker.testing.training import check_image

_LARGEST_REQUEST = 25 * 1024 * 1024
"""Bytes of one invocation."""

_CUSTOM = "X-Amzn-SageMaker-Custom-Attributes"


class Model(Resource):
    """A model: an image and its data."""

    kind, noun, title = "model", "model", "Model"

    @property
    def description(self) -> Json:
        """The answer of DescribeModel."""
        return {"EnableNetworkIsolation": False, **super().description}


class EndpointConfig(Resource):
    """What an endpoint is made from."""

    kind, noun, title = "endpoint-config", "endpoint configuration", "EndpointConfig"


class Hosting:
    """SageMaker's operations on models, endpoint configurations and endpoints, and the runtime."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def create_model(self, request: Json) -> Json:
        """Create a model."""
        account, container = self._account, container_of(request)
        if "ExecutionRoleArn" not in request:
            raise Refused("ExecutionRoleArn is missing")
        account.check_role(request["ExecutionRoleArn"])
        check_image(account, container["Image"])
        uri, packed = model_data(container)
        if uri:
            try:
                account.storage.read(uri) if packed else account.storage.items(uri)
            except Refused as error:
                raise Refused(f"Could not find model data at {uri}.") from error
        model = Model(account, request)
        account.add(model)
        return {"ModelArn": model.arn}

    def describe_model(self, request: Json) -> Json:
        """Describe a model."""
        return self._account.find(Model, request["ModelName"]).description

    def list_models(self, request: Json) -> Json:
        """List the models."""
        return listed(self._account.all(Model), request, "Models")

    def delete_model(self, request: Json) -> Json:
        """Delete a model. Endpoints that run it go on."""
        self._account.remove(self._account.find(Model, request["ModelName"]))
        return {}

    def create_endpoint_config(self, request: Json) -> Json:
        """Create an endpoint configuration."""
        variants = request["ProductionVariants"]
        if len(variants) != 1 or request.get("ShadowProductionVariants"):
            raise Refused("an endpoint has one production variant here; more are not simulated")
        if "AsyncInferenceConfig" in request:
            raise Refused("asynchronous inference is not simulated")
        for variant in variants:
            if "ModelName" not in variant:
                raise Refused("the production variant names no model; inference components are not simulated")
            self._account.find(Model, variant["ModelName"])
            if ("InstanceType" in variant) == ("ServerlessConfig" in variant):
                raise Refused("a production variant needs either InstanceType or ServerlessConfig")
        config = EndpointConfig(self._account, request)
        self._account.add(config)
        return {"EndpointConfigArn": config.arn}

    def describe_endpoint_config(self, request: Json) -> Json:
        """Describe an endpoint configuration."""
        return self._account.find(EndpointConfig, request["EndpointConfigName"]).description

    def list_endpoint_configs(self, request: Json) -> Json:
        """List the endpoint configurations."""
        return listed(self._account.all(EndpointConfig), request, "EndpointConfigs")

    def delete_endpoint_config(self, request: Json) -> Json:
        """Delete an endpoint configuration."""
        self._account.remove(self._account.find(EndpointConfig, request["EndpointConfigName"]))
        return {}

    def create_endpoint(self, request: Json) -> Json:
        """Start an endpoint."""
        endpoint = Endpoint(self._account, request, *self._configured(request))
        self._check_instances(endpoint.variant)
        endpoint.start()
        return {"EndpointArn": endpoint.arn}

    def update_endpoint(self, request: Json) -> Json:
        """Move an endpoint to another configuration; the old one serves until the new one does."""
        endpoint = self._account.find(Endpoint, request["EndpointName"])
        endpoint.update(request["EndpointConfigName"], *self._configured(request))
        return {"EndpointArn": endpoint.arn}

    def _configured(self, request: Json) -> tuple[Json, Json]:
        config = self._account.find(EndpointConfig, request["EndpointConfigName"])
        variant: Json = config.request["ProductionVariants"][0]
        return variant, self._account.find(Model, variant["ModelName"]).request

    def _check_instances(self, variant: Json) -> None:
        if "InstanceType" not in variant:
            return
        kind = variant["InstanceType"]
        running = sum(
            endpoint.variant.get("InitialInstanceCount", 1)
            for endpoint in self._account.all(Endpoint)
            if endpoint.variant.get("InstanceType") == kind
        )
        self._account.quotas.check("endpoint usage", kind, running, variant.get("InitialInstanceCount", 1))

    def describe_endpoint(self, request: Json) -> Json:
        """Describe an endpoint."""
        return self._account.find(Endpoint, request["EndpointName"]).description

    def list_endpoints(self, request: Json) -> Json:
        """List the endpoints."""
        return listed(self._account.all(Endpoint), request, "Endpoints")

    def delete_endpoint(self, request: Json) -> Json:
        """Delete an endpoint and end its process."""
        self._account.find(Endpoint, request["EndpointName"]).delete()
        return {}

    def invoke(self, name: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request to an endpoint's container; return its answer as the runtime gives it."""
        try:
            endpoint = self._account.find(Endpoint, name)
        except NotFound:
            endpoint = None
        if endpoint is None or endpoint.status not in ("InService", "Updating") or endpoint.server is None:
            raise Refused(f"Endpoint {name} of account {self._account.number} not found.", "ValidationError")
        if len(body) > _LARGEST_REQUEST:
            raise Refused(f"Request of {len(body)} bytes is larger than {_LARGEST_REQUEST}", "ValidationError", 413)
        passed = {wanted: headers[wanted] for wanted in ("Content-Type", "Accept", _CUSTOM) if headers.get(wanted)}
        try:
            answer = endpoint.server.ask("POST", "/invocations", body, passed)
        except (OSError, http.client.HTTPException) as error:
            raise endpoint.model_error(f"no answer from the container: {error}", 0) from error
        finally:
            endpoint.server.log.flush()
        if answer.status != 200:
            raise endpoint.model_error(answer.body.decode(errors="replace"), answer.status)
        given = {name.lower(): value for name, value in answer.headers.items()}
        kept = {
            "Content-Type": given.get("content-type", "application/octet-stream"),
            "x-Amzn-Invoked-Production-Variant": endpoint.variant["VariantName"],
        }
        if _CUSTOM.lower() in given:
            kept[_CUSTOM] = given[_CUSTOM.lower()]
        return Answer(200, kept, answer.body)
