"""Compare the integer reference with onnxruntime, region by region on equal input codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.errors import ModelError
from bitwright.quant.float_ops import Array, make_session
from bitwright.quant.graph import all_nodes, attribute, constant, is_quantizer
from bitwright.quant.load import Model
from bitwright.quant.reference import Reference
from bitwright.quant.requantization import RequantizationForm
from bitwright.quant.samples import ProgressCallback, Samples

__all__ = ["RegionAgreement", "compare_codes"]


@dataclass(frozen=True, slots=True)
class RegionAgreement:
    """How many codes of one region are equal in reference and onnxruntime.

    Attributes
    ----------
    name, kind, operand_bits, accumulator_bits
        See :class:`~bitwright.quant.reference.Region`.
    codes
        Codes compared.
    differing
        Codes that differ where both got the same input codes.
    largest_difference
        The largest difference among those, in codes.
    differing_end_to_end
        Codes that differ where each ran from the model's inputs on its own codes.
    """

    name: str
    kind: str
    operand_bits: int
    accumulator_bits: int
    codes: int
    differing: int
    largest_difference: int
    differing_end_to_end: int

    @property
    def equal_share(self) -> float:
        """Share of equal codes on equal input codes, 0 to 1."""
        return 1.0 - self.differing / self.codes if self.codes else 1.0


def compare_codes(
    model: Model,
    samples: Samples,
    *,
    requantization: RequantizationForm = "float",
    batch_size: int = 16,
    progress: ProgressCallback | None = None,
) -> list[RegionAgreement]:
    """Run a QDQ model in onnxruntime (graph optimisations off) and in the integer reference.

    Parameters
    ----------
    model
        A quantized model.
    samples
        Inputs to run.
    requantization
        Form of requantization in the reference.
    batch_size
        Samples a run.

    Returns
    -------
    list
        One entry for every quantized activation, in order of execution.

    Raises
    ------
    ModelError
        If the model is not quantized, or computes its scales.
    """
    # Codes below 8 bits cannot leave onnxruntime, so they are read off the dequantized values.
    dequantized = {
        str(node.outputs[0].name): use.node
        for node in all_nodes(model.graph)
        if node.domain == "" and node.op_type == "QuantizeLinear"
        for use in node.outputs[0].uses()
        if use.node.op_type == "DequantizeLinear" and use.node.graph is node.graph
    }
    encoded = {
        str(node.outputs[0].name): node for node in all_nodes(model.graph) if _is_encoder(node)
    }
    if not dequantized and not encoded:
        raise ModelError(
            "has no quantized activations", where=model.source, fix="quantize it first"
        )
    for node in (*dequantized.values(), *encoded.values()):
        if any(value is not None and constant(value) is None for value in node.inputs[1:]):
            raise ModelError(
                f"computes the scale or zero point of {node.name!r}: it has no codes to compare",
                where=model.source,
                fix="quantize it statically, with constant scales",
            )
    read = (*dequantized.values(), *encoded.values())
    wanted = list(dict.fromkeys(node.outputs[0] for node in read))
    session = make_session(model.to_proto_with_outputs(wanted), optimize=False)
    reference = Reference(model, requantization)
    totals = {codes: np.zeros(4, np.int64) for codes in (*dequantized, *encoded)}
    done = 0
    for batch in samples.batches(batch_size):
        results = dict(zip(wanted, session.run(None, batch.inputs), strict=True))
        theirs = {
            codes: _codes(results[node.outputs[0]], node, in_loop=node.graph is not model.graph)
            for codes, node in dequantized.items()
        }
        for codes, node in encoded.items():
            theirs[codes] = results[node.outputs[0]].astype(np.int64)
        _, ours = reference.run(batch.inputs, given=theirs)
        _, alone = reference.run(batch.inputs)
        for codes, total in totals.items():
            if not theirs[codes].size:  # a loop without a step has none
                continue
            difference = _differences(ours.get(codes), theirs[codes])
            total[0] += difference.size
            total[1] += np.count_nonzero(difference)
            total[2] = max(total[2], difference.max(initial=0))
            total[3] += np.count_nonzero(_differences(alone.get(codes), theirs[codes]))
        done += batch.samples
        if progress is not None:
            progress(done, len(samples))
    return [
        RegionAgreement(
            region.name,
            region.kind,
            region.operand_bits,
            region.accumulator_bits,
            *(int(number) for number in totals[codes]),
        )
        for codes, region in reference.regions.items()
        if codes in totals
    ]


def _is_encoder(node: ir.Node) -> bool:
    return is_quantizer(node) and node.domain != ""


def _differences(ours: Array | None, theirs: Array) -> Array:
    """Magnitudes of the differences; 1 for the codes of steps that a loop of ours does not reach.

    A loop whose condition is computed may end earlier or later on other codes.
    """
    if ours is None:
        return np.ones_like(theirs)
    if ours.shape == theirs.shape:
        return np.asarray(np.abs(ours - theirs))
    found = np.ones_like(theirs)
    steps = min(len(ours), len(theirs))
    found[:steps] = np.abs(ours[:steps] - theirs[:steps])
    return found


def _codes(values: Array, node: ir.Node, *, in_loop: bool) -> Array:
    """Codes of dequantized values: (code - zero point) * scale divided by the scale is exact."""
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert scale is not None
    shape = [1] * values.ndim
    if scale.size > 1:
        axis = attribute(node, "axis", 1)
        shape[axis + 1 if in_loop and axis >= 0 else axis] = -1  # steps come first
    zero_codes = np.zeros(1, np.int64) if zero is None else zero.astype(np.int64)
    codes = np.rint(values.astype(np.float64) / scale.astype(np.float64).reshape(shape))
    return codes.astype(np.int64) + zero_codes.reshape(shape if zero_codes.size > 1 else ())
