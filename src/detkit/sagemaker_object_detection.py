"""The hyperparameters of SageMaker's built-in "Object Detection - MXNet" algorithm, by its names, ranges and defaults.

They are those of the page "Object Detection Hyperparameters" of the Amazon SageMaker Developer Guide. One plugin hands
them to the service, another trains here what was written for there.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from detkit.params import Params


class BuiltinParams(Params, frozen=True, kw_only=True):
    """The hyperparameters of the built-in algorithm, in the order of its documentation."""

    num_classes: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="number of classes; required there")] = (
        None
    )
    num_training_samples: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="number of training images; required there")
    ] = None
    base_network: Annotated[Literal["vgg-16", "resnet-50"], Meta(description="network below the detector")] = "vgg-16"
    early_stopping: Annotated[bool, Meta(description="whether to end when the validation mAP no longer rises")] = False
    early_stopping_min_epochs: Annotated[int, Meta(ge=1, description="epochs that early stopping waits for")] = 10
    early_stopping_patience: Annotated[int, Meta(ge=1, description="epochs without a gain that end training")] = 5
    early_stopping_tolerance: Annotated[
        float, Meta(ge=0, le=1, description="relative rise of the validation mAP that is a gain")
    ] = 0.0
    image_shape: Annotated[int, Meta(ge=300, description="side of the square input, pixels")] = 300
    epochs: Annotated[int, Meta(ge=1, description="passes over the training images")] = 30
    freeze_layer_pattern: Annotated[
        str | None, Meta(description="regular expression of the layers of the base network that are not trained")
    ] = None
    kv_store: Annotated[
        Literal["dist_sync", "dist_async"] | None, Meta(description="how several hosts exchange weights")
    ] = None
    label_width: Annotated[
        int, Meta(ge=1, description="numbers that the label of an image is padded to, in RecordIO files")
    ] = 350
    learning_rate: Annotated[float, Meta(gt=0, le=1, description="first learning rate")] = 0.001
    lr_scheduler_factor: Annotated[
        float, Meta(gt=0, lt=1, description="what the learning rate is multiplied by at each step")
    ] = 0.1
    lr_scheduler_step: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(description="epochs after which the learning rate falls, with commas between"),
    ] = ()
    mini_batch_size: Annotated[int, Meta(ge=1, description="images per step")] = 32
    momentum: Annotated[float, Meta(gt=0, le=1, description="momentum of sgd")] = 0.9
    nms_threshold: Annotated[float, Meta(gt=0, le=1, description="IoU above which the weaker of two boxes goes")] = 0.45
    optimizer: Annotated[Literal["sgd", "adam", "rmsprop", "adadelta"], Meta(description="optimizer")] = "sgd"
    overlap_threshold: Annotated[
        float, Meta(gt=0, le=1, description="IoU from which a detection counts, in the validation mAP")
    ] = 0.5
    use_pretrained_model: Annotated[
        Literal[0, 1], Meta(description="whether the base network starts from ImageNet weights")
    ] = 1
    weight_decay: Annotated[float, Meta(gt=0, lt=1, description="weight decay of sgd and rmsprop")] = 0.0005
