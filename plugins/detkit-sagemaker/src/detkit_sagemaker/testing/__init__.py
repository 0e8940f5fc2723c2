"""A simulated AWS for tests and dry runs: real HTTP on the loopback, jobs that really run, and nothing that costs."""

from detkit_sagemaker.testing.faults import Faults
from detkit_sagemaker.testing.simulator import Simulator, serve_forever

__all__ = ["Faults", "Simulator", "serve_forever"]
