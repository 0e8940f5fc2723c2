"""The metric oLRP: how much is found, how much of it is right, and how tight the boxes are, in one error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from detkit.metrics import Metric


@hookimpl
def detkit_metrics() -> Iterable[Metric]:
    """Offer the one metric. numpy comes with the call, so that importing this module is cheap."""
    from detkit.metrics import Metric
    from detkit_lrp.lrp import compute

    yield Metric(
        name="olrp",
        summary="optimal Localisation Recall Precision error at IoU 0.5, and its components; 0 is perfect, 1 useless",
        compute=compute,
        higher_is_better=False,
    )
