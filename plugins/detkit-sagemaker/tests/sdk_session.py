"""What a user of the SageMaker Python SDK, version 3, types: training, tuning, an endpoint, a batch transform.

`test_sdk.py` runs it by a Python that has the SDK, with the role, the bucket and what lies in it as JSON on stdin. It
writes what it saw to ``seen.json``. Nothing in it knows of detkit or of the simulator.
"""

import json
import sys
from pathlib import Path

from sagemaker.core import image_uris
from sagemaker.core.helper.session_helper import Session
from sagemaker.core.jumpstart.configs import JumpStartConfig
from sagemaker.core.parameter import ContinuousParameter
from sagemaker.core.resources import Endpoint, EndpointConfig, Model
from sagemaker.core.shapes import ContainerDefinition, ProductionVariant
from sagemaker.core.transformer import Transformer
from sagemaker.train import ModelTrainer
from sagemaker.train.configs import Compute, InputData, OutputDataConfig, StoppingCondition
from sagemaker.train.tuner import HyperparameterTuner

given = json.load(sys.stdin)
role, bucket = given["role"], given["bucket"]
session = Session(default_bucket=bucket)  # the default one would be asked of STS itself, not of AWS_ENDPOINT_URL
image = image_uris.retrieve("object-detection", session.boto_region_name)
seen = {"image": image}

RECORDS = "application/x-recordio"
CHANNELS = [
    InputData(channel_name="train", data_source=f"s3://{bucket}/records", content_type=RECORDS),
    InputData(channel_name="validation", data_source=f"s3://{bucket}/records", content_type=RECORDS),
]
SHARED = {
    "role": role,
    "sagemaker_session": session,
    "compute": Compute(instance_type="ml.g4dn.xlarge", instance_count=1, volume_size_in_gb=30),
    "stopping_condition": StoppingCondition(max_runtime_in_seconds=600),
    "output_data_config": OutputDataConfig(s3_output_path=f"s3://{bucket}/output"),
}


def built_in(epochs: int) -> ModelTrainer:
    """Return a trainer of AWS's built-in algorithm."""
    hyperparameters = {
        "num_classes": given["num_classes"],
        "num_training_samples": given["num_images"],
        "epochs": epochs,
        "mini_batch_size": 2,
        "use_pretrained_model": 0,
    }
    return ModelTrainer(training_image=image, base_job_name="birds", hyperparameters=hyperparameters, **SHARED)


trainer = built_in(epochs=2)
trainer.train(input_data_config=CHANNELS)
first = trainer._latest_training_job.refresh()
artifact = first.model_artifacts.s3_model_artifacts
seen["trained"] = [first.training_job_status, first.secondary_status]
seen["metrics"] = {one.metric_name: one.value for one in first.final_metric_data_list}

parent = InputData(channel_name="model", data_source=artifact, content_type="application/x-sagemaker-model")
more = built_in(epochs=1)
more.train(input_data_config=[*CHANNELS, parent])
seen["trained on"] = more._latest_training_job.refresh().training_job_status

# The SDK has JumpStart's containers run a script of its own at /opt/ml; without such a folder the job fails, and is not
# waited for.
ready = ModelTrainer.from_jumpstart_config(
    jumpstart_config=JumpStartConfig(model_id="mxnet-od-ssd-512-resnet50-v1-coco"),
    base_job_name="jumpstart",
    hyperparameters={"epochs": 2},
    **{**SHARED, "compute": None},
)
pictures = InputData(channel_name="training", data_source=f"s3://{bucket}/jumpstart/")
ready.train(input_data_config=[pictures], wait=given["opt_ml"])
job = ready._latest_training_job.refresh()
seen["jumpstart"] = [one.channel_name for one in job.input_data_config]
seen["jumpstart status"] = job.training_job_status

tuner = HyperparameterTuner(
    model_trainer=built_in(epochs=1),
    objective_metric_name="validation:mAP",
    hyperparameter_ranges={"learning_rate": ContinuousParameter(0.01, 0.5)},
    max_jobs=3,
    max_parallel_jobs=2,
    strategy="Random",
    base_tuning_job_name="birds",
)
tuner.tune(inputs=CHANNELS)
table = tuner.analytics().dataframe()
seen["tuned"] = tuner.latest_tuning_job.refresh().hyper_parameter_tuning_job_status
seen["best"] = tuner.best_training_job()
seen["objectives"] = dict(zip(table["TrainingJobName"], table["FinalObjectiveValue"], strict=True))

container = ContainerDefinition(image=image, model_data_url=artifact)
model = Model.create(model_name="birds", primary_container=container, execution_role_arn=role)

variant = ProductionVariant(
    variant_name="all", model_name="birds", instance_type="ml.m5.xlarge", initial_instance_count=1
)
config = EndpointConfig.create(endpoint_config_name="birds", production_variants=[variant])
endpoint = Endpoint.create(endpoint_name="birds", endpoint_config_name="birds")
endpoint.wait_for_status("InService")
answer = endpoint.invoke(body=Path(given["picture"]).read_bytes(), content_type="application/x-image")
seen["answered"] = json.loads(answer.body.read())["prediction"]
seen["endpoints"] = [one.endpoint_name for one in Endpoint.get_all()]
endpoint.delete()
endpoint.wait_for_delete()
config.delete()

transformer = Transformer(
    model_name="birds",
    instance_count=1,
    instance_type="ml.m5.xlarge",
    output_path=f"s3://{bucket}/answers",
    sagemaker_session=session,
)
transformer.transform(f"s3://{bucket}/pictures", content_type="application/x-image")
objects = session.boto_session.client("s3").list_objects_v2(Bucket=bucket, Prefix="answers/")
seen["answers"] = sorted(one["Key"] for one in objects["Contents"])
model.delete()

Path("seen.json").write_text(json.dumps(seen))
