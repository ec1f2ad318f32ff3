"""``bitwright inspect``: the layers of a model, and why the rest are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.quant.layers import NotLayer, find_layers, layer_nodes, quantized_precision
from bitwright.quant.load import Model, ValueType, load
from bitwright.vocabulary import Layer, Precision

__all__ = ["Inspection", "inspect", "one_sample", "shape_option"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes
    ----------
    source
        The file.
    opset
        Version of the standard operator set after loading.
    inputs, outputs
        Names, element types and shapes of the model as it was given.
    assumed
        Symbolic leading dimensions that were taken as 1 so that MACs can be counted, by input.
    layers
        The layers, in order of execution.
    precisions
        Precision of every layer of a quantized model; empty for a float model.
    others
        All other operators, each with the reason why it is no layer.
    structure_hash, weights_hash
        What a precision plan refers to.
    notes
        What was changed while loading.
    """

    source: str
    opset: int
    inputs: tuple[ValueType, ...]
    outputs: tuple[ValueType, ...]
    assumed: tuple[str, ...]
    layers: tuple[Layer, ...]
    precisions: Mapping[str, Precision | None]
    others: tuple[NotLayer, ...]
    structure_hash: str
    weights_hash: str
    notes: tuple[str, ...]

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all layers; None if one of them is unknown."""
        counts = [layer.macs for layer in self.layers]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def weight_count(self) -> int:
        """Weights of all layers."""
        return sum(layer.weight_count for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""

        def tensor(entry: ValueType) -> dict[str, Any]:
            return {"name": entry.name, "dtype": str(entry.dtype), "shape": entry.shape}

        return {
            "source": self.source,
            "opset": self.opset,
            "structure_hash": self.structure_hash,
            "weights_hash": self.weights_hash,
            "inputs": [tensor(entry) for entry in self.inputs],
            "outputs": [tensor(entry) for entry in self.outputs],
            "assumed": list(self.assumed),
            "macs": self.macs,
            "weight_count": self.weight_count,
            "layers": [
                {
                    **asdict(layer),
                    "macs": layer.macs,
                    "weight_count": layer.weight_count,
                    "precision": None
                    if self.precisions.get(layer.name) is None
                    else str(self.precisions[layer.name]),
                }
                for layer in self.layers
            ],
            "not_layers": [asdict(other) for other in self.others],
            "notes": list(self.notes),
        }


def inspect(
    model: str | Path, *, input_shapes: Mapping[str, Sequence[int | None]] | None = None
) -> Inspection:
    """Find the layers of an ONNX model.

    Parameters
    ----------
    model
        An ONNX file, float or quantized.
    input_shapes
        Input name to shape, fixes symbolic dimensions. A symbolic first dimension that is left
        open counts as 1, so that MACs are those of one sample.

    Raises
    ------
    ModelError
        If the model cannot be loaded or a shape does not fit it.
    """
    original = load(model)
    loaded = original.with_input_shapes(input_shapes) if input_shapes else original
    counted, assumed = one_sample(loaded)
    layers, others = find_layers(counted)
    nodes = layer_nodes(counted)
    return Inspection(
        source=original.source,
        opset=original.opset,
        inputs=original.inputs,
        outputs=original.outputs,
        assumed=assumed,
        layers=layers,
        precisions={name: quantized_precision(node) for name, node in nodes.items()}
        if original.is_quantized
        else {},
        others=others,
        structure_hash=original.structure_hash,
        weights_hash=original.weights_hash,
        notes=original.notes,
    )


def shape_option(inputs: Sequence[ValueType]) -> str:
    """The option that fixes the sizes of the first input that needs it."""
    for entry in inputs:
        if any(isinstance(dim, str) for dim in entry.shape or ()):
            sizes = (str(d) if isinstance(d, int) else "<size>" for d in entry.shape or ())
            return f"--input-shape {entry.name}={','.join(sizes)}"
    return "--input-shape"


def one_sample(model: Model) -> tuple[Model, tuple[str, ...]]:
    """Take symbolic first dimensions as 1 where all others are known, and say which."""
    shapes, assumed = {}, []
    for entry in model.inputs:
        if not entry.shape or isinstance(entry.shape[0], int):
            continue
        rest = [dim for dim in entry.shape[1:] if isinstance(dim, int)]
        if len(rest) == len(entry.shape) - 1:
            shapes[entry.name] = [1, *rest]
            assumed.append(f"{entry.shape[0]} = 1 ({entry.name})")
    return (model.with_input_shapes(shapes), tuple(assumed)) if shapes else (model, ())
