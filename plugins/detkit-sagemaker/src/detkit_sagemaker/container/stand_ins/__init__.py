"""Stand-ins for AWS's own images, which run only at AWS: the built-in object detection, and JumpStart's.

They read what those read, check it as far as AWS documents what is refused, print the lines that the service looks for,
and answer in the same JSON. What is trained is a real engine of detkit, ``echo/memory`` or the one that
``DETKIT_STAND_IN_ENGINE`` names, and not AWS's algorithm: scores and texts of errors are others. The first line that a
stand-in prints says so.

Sources: the pages "Object Detection - MXNet", "Object Detection Hyperparameters", "Object Detection Request and
Response Formats", "Tune an Object Detection Model" and "Incremental Training" of the Amazon SageMaker developer guide;
the notebook "Introduction to JumpStart - Object Detection" of amazon-sagemaker-examples.
"""
