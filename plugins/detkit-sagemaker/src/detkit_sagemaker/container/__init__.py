"""What runs inside a SageMaker container of ours: the worker in training, an HTTP server in hosting.

It needs the standard library and what detkit's worker needs, on Python 3.11 and later; not boto3. `build` makes the
image. `stand_ins` answer for AWS's own images, which nobody can run outside of AWS.
"""
