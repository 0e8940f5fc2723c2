"""Metrics as the platform sees them: regular expressions over the lines that a container prints."""

from __future__ import annotations

import contextlib
import re
import threading
from datetime import datetime
from typing import Any

from detkit_sagemaker.testing.account import now
from detkit_sagemaker.testing.containers import Images
from detkit_sagemaker.testing.refusals import Refused

_QUALITY = r"#quality_metric: host=\S+, epoch=\S+, "
_BUILT_IN = {
    "train:progress": r"#progress_metric: host=\S+, completed (\S+) %",
    "train:smooth_l1": _QUALITY + r"batch=\S+ train smooth_l1 <loss>=(\S+)",
    "train:cross_entropy": _QUALITY + r"batch=\S+ train cross_entropy <loss>=(\S+)",
    "train:throughput": r"#throughput_metric: host=\S+, train throughput=(\S+) records/second",
    "validation:mAP": _QUALITY + r"validation mAP <score>=\((\S+)\)",
}
"""What the service itself attaches to its built-in object detection (a console's view of such a job)."""


def definitions(image: str, wanted: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a job's metric definitions. Raises `Refused` where they cannot be chosen, or are no expressions."""
    if is_built_in(image):
        if wanted:
            raise Refused(
                "You can't override the metric definitions for Amazon SageMaker algorithms. Please retry the request "
                "without specifying metric definitions."
            )
        return [{"Name": name, "Regex": regex} for name, regex in _BUILT_IN.items()]
    for one in wanted:
        try:
            groups = re.compile(one["Regex"]).groups
        except re.error as error:
            raise Refused(f"metric {one['Name']}: {one['Regex']} is no regular expression: {error}") from error
        if groups < 1:
            raise Refused(f"metric {one['Name']}: {one['Regex']} has no group that captures the value")
    return wanted


def is_built_in(image: str) -> bool:
    """Whether an image is AWS's own object detection."""
    return Images({image: []}).names == ["object-detection:1"]


class Metrics:
    """The latest value of every metric of a job."""

    def __init__(self, wanted: list[dict[str, str]]) -> None:
        self._wanted = [(one["Name"], re.compile(one["Regex"])) for one in wanted]
        self._values: dict[str, tuple[float, datetime]] = {}
        self._lock = threading.Lock()

    def read(self, line: str) -> None:
        """Take the values out of a line."""
        for name, pattern in self._wanted:
            if found := pattern.search(line):
                with contextlib.suppress(ValueError), self._lock:
                    self._values[name] = float(found.group(1)), now()

    def value(self, name: str) -> float | None:
        """Return the latest value of a metric; None where no line had one."""
        with self._lock:
            return self._values[name][0] if name in self._values else None

    @property
    def final(self) -> list[dict[str, Any]]:
        """The content of ``FinalMetricDataList``."""
        with self._lock:
            return [
                {"MetricName": name, "Value": value, "Timestamp": time} for name, (value, time) in self._values.items()
            ]
