"""MXNet's ``*-symbol.json``, read without MXNet: what is in it, and the part of it that detects.

A symbol may be anybody's. MXNet is only given a graph that is written anew from what was understood: the nodes that
lead to the detections, of operators that compute from their inputs alone. Others take Python objects or addresses of
memory from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from detkit.errors import InvalidData, Unsupported

OPERATORS = {
    *("null", "_arange", "_copy", "identity", "elemwise_add", "broadcast_add", "broadcast_mul", "_mul_scalar"),
    *(
        "_greater_scalar",
        "ones_like",
        "zeros_like",
        "where",
        "slice_axis",
        "slice_like",
        "Reshape",
        "Flatten",
        "Concat",
    ),
    *("transpose", "Activation", "BatchNorm", "Convolution", "Dropout", "L2Normalization", "Pooling", "softmax"),
    *("SoftmaxActivation", "BlockGrad", "_contrib_MultiBoxPrior", "_contrib_box_decode", "_contrib_box_nms"),
}
"""What SSD takes, in MXNet's ``example/ssd`` and in GluonCV."""

DETECTION, TARGET = "_contrib_MultiBoxDetection", "_contrib_MultiBoxTarget"
LOCATIONS = "multibox_loc_pred"
"""The name that ``example/ssd`` gives to the offsets of the boxes."""

_MOST_BYTES, _MOST_NODES = 16_000_000, 20_000
"""Those of a ResNet-50 are 130 kB and 536."""
_FIRST_VERSION = 10_000
"""1.0.0, the first to write what is read here."""

Output: TypeAlias = tuple[int, int]
"""A node and which of its outputs."""


class _Node(msgspec.Struct, frozen=True):
    op: str
    name: str
    inputs: list[list[int]]
    attrs: dict[str, str] = {}


class _File(msgspec.Struct, frozen=True):
    nodes: list[_Node]
    heads: list[list[int]]
    attrs: dict[str, tuple[str, Any]] = {}


@dataclass(frozen=True)
class MultiBoxHead:
    """What ``MultiBoxDetection`` is computed from."""

    classes: Output
    """``(b, classes + 1, anchors)``, the background first."""
    are_scores: bool
    """Whether `classes` are probabilities already."""
    offsets: Output
    anchors: Output
    settings: Mapping[str, str]
    """Attributes of the file's own ``MultiBoxDetection``; empty where it has none."""


class Graph:
    """A symbol: nodes, each behind those it needs, and the outputs that the symbol has."""

    def __init__(self, nodes: Sequence[_Node], heads: Sequence[Output], version: int) -> None:
        self.nodes, self.heads, self._version = nodes, heads, version

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Read a file that MXNet 1.0 or later wrote. Raises `InvalidData`."""
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidData(f"{path.name} has more than {_MOST_BYTES / 1e6:.0f} MB, which is no network")
        try:
            file = msgspec.json.decode(path.read_bytes(), type=_File)
            heads = [_output(one) for one in file.heads]
        except (msgspec.DecodeError, ValueError) as error:
            raise InvalidData(f"{path.name} is no symbol of MXNet: {error}") from None
        if len(file.nodes) > _MOST_NODES:
            raise InvalidData(f"{path.name} has {len(file.nodes)} nodes, which is no network; expected {_MOST_NODES}")
        for index, node in enumerate(file.nodes):
            if not all(len(one) >= 2 and 0 <= one[0] < index and one[1] >= 0 for one in node.inputs):
                raise InvalidData(f"{path.name}: node {index}, {node.name!r}, needs what does not come before it")
        if not heads or not all(0 <= index < len(file.nodes) for index, _ in heads):
            raise InvalidData(f"{path.name} names no outputs that it has")
        _, version = file.attrs.get("mxnet_version", ("int", _FIRST_VERSION))
        return cls(file.nodes, heads, version if isinstance(version, int) else _FIRST_VERSION)

    def operators(self) -> list[str]:
        """Return the names of the operators, each once, parameters left out."""
        return sorted({node.op for node in self.nodes} - {"null"})

    def find_multibox(self) -> MultiBoxHead | None:
        """Return what a detector of ``example/ssd`` ends in, also before it was made for deployment; None for others.

        A symbol for training either detects as well, to be watched, or only has the anchors' targets.
        """
        detection, target = self._last(DETECTION), self._last(TARGET)
        if detection is not None and len(detection.inputs) == 3:
            scores, offsets, anchors = map(_output, detection.inputs)
            node = self.nodes[scores[0]]
            if node.op == "SoftmaxOutput" and node.inputs:  # which wants labels, even where it only predicts
                return MultiBoxHead(_output(node.inputs[0]), False, offsets, anchors, detection.attrs)
            return MultiBoxHead(scores, True, offsets, anchors, detection.attrs)
        named = [index for index, node in enumerate(self.nodes) if node.name == LOCATIONS]
        if target is not None and len(target.inputs) == 3 and named:
            anchors, _, classes = map(_output, target.inputs)
            return MultiBoxHead(classes, False, (named[-1], 0), anchors, {})
        return None

    def ends_in_gluoncv(self) -> bool:
        """Return whether the outputs are those of GluonCV's detectors: ids, scores and boxes, cut from one table."""
        last = [self.nodes[index] for index, _ in self.heads]
        return [node.op for node in last] == ["slice_axis"] * 3 and self._last("_contrib_box_nms") is not None

    def own_normalisation(self) -> str | None:
        """Return the name of the running mean of a BatchNorm that the image itself goes through; None without one."""
        images = {index for index, node in enumerate(self.nodes) if (node.op, node.name) == ("null", "data")}
        for index, node in enumerate(self.nodes):
            if not node.inputs or node.inputs[0][0] not in images:
                continue
            if node.op in {"_copy", "identity"}:
                images.add(index)
            elif node.op == "BatchNorm" and len(node.inputs) == 5:
                return self.nodes[node.inputs[3][0]].name
        return None

    def part(self, outputs: Iterable[Output], changes: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """Return what leads to some outputs, as a symbol's JSON; ``changes`` are attributes of operators.

        Raises `Unsupported` where that takes operators that are not among `OPERATORS`.
        """
        outputs = list(outputs)
        needed = {index for index, _ in outputs}
        for index in range(len(self.nodes) - 1, -1, -1):
            if index in needed:
                needed.update(one[0] for one in self.nodes[index].inputs)
        unknown = {self.nodes[index].op for index in needed} - OPERATORS
        if unknown:
            raise Unsupported(f"the network takes operators that SSD does not: {', '.join(sorted(unknown))}")
        new = {index: number for number, index in enumerate(sorted(needed))}
        nodes: list[dict[str, Any]] = []
        for index in new:
            node = self.nodes[index]
            attrs = {**node.attrs, **(changes or {}).get(node.op, {})}
            inputs = [[new[one[0]], *one[1:]] for one in node.inputs]
            nodes.append({"op": node.op, "name": node.name, "inputs": inputs, "attrs": attrs})
        variables = [number for number, node in enumerate(nodes) if node["op"] == "null"]
        heads = [[new[index], which, 0] for index, which in outputs]
        version = {"mxnet_version": ["int", self._version]}  # by which MXNet knows what to bring up to date
        return msgspec.json.encode({"nodes": nodes, "arg_nodes": variables, "heads": heads, "attrs": version}).decode()

    def _last(self, operator: str) -> _Node | None:
        return next((node for node in reversed(self.nodes) if node.op == operator), None)


def _output(values: Sequence[int]) -> Output:
    if len(values) < 2 or min(values) < 0:
        raise ValueError(f"{list(values)} is no output of a node")
    return values[0], values[1]
