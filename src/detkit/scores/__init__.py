"""Score detections against ground truth: the COCO protocol with its limit on detections where the user put it.

`score` runs no model, so engines validate with it inside the worker and the controller evaluates with it. hotcoco
computes the precision and recall arrays; the headline numbers are means over them, taken at the limit that was asked
for (pycocotools prints -1 for AP at any limit but 100). What hotcoco has not, or not by this protocol, is computed from
matches of our own: the best threshold, curves, Pascal VOC's numbers, confusions, and the bootstrap.

`result` has the numbers and calls the rest; `matching` and `engine` say which detection finds which object.
"""

from detkit.scores.certainty import Interval
from detkit.scores.protocol import AREAS, IOU_THRESHOLDS, SCORE_FLOOR, Protocol
from detkit.scores.result import ErrorType, Scores, score

__all__ = ["AREAS", "IOU_THRESHOLDS", "SCORE_FLOOR", "ErrorType", "Interval", "Protocol", "Scores", "score"]
