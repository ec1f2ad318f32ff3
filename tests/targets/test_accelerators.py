from __future__ import annotations

import dataclasses
import itertools
import pickle
from pathlib import Path

import pytest

from bitwright import Layer, Precision, PrecisionPlan, targets
from bitwright.errors import PlanError, RunError, UsageError
from bitwright.vocabulary import Activation
from tests.targets.descriptions import changed, write

WIDTHS = (2, 4, 8, 16)


def allowed(name: str) -> set[tuple[int, int]]:
    accelerator = targets.get(name)
    return {
        (weights, activations)
        for weights, activations in itertools.product(WIDTHS, WIDTHS)
        if accelerator.allows(Precision(weights, activations))
    }


def test_precisions_are_those_of_the_papers() -> None:
    # Bit Fusion: arXiv 1712.01507; both as searched in MOHAQ, arXiv 2108.01192.
    assert allowed("bitfusion/eyeriss") == set(itertools.product(WIDTHS, WIDTHS))
    assert allowed("silago/drra") == {(4, 4), (8, 8), (16, 16)}


def test_check_names_the_refused_layers_and_what_is_allowed() -> None:
    silago = targets.get("silago/drra")
    silago.check({"a": Precision(4, 4), "b": Precision(16, 16)})
    with pytest.raises(PlanError) as raised:
        silago.check(
            {"a": Precision(4, 4), "b": Precision(4, 8), "c": Precision(2, 2)}, where="plan.json"
        )
    assert str(raised.value) == (
        "plan.json: silago/drra cannot do the precision of 2 layers: b (w4a8), c (w2a2)\n"
        "  it allows w4a4, w8a8, w16a16"
    )


def test_check_names_at_most_20_layers() -> None:
    layers = {f"layer{number}": Precision(2, 8) for number in range(25)}
    layers["other"] = Precision(8, 8)
    with pytest.raises(PlanError, match=r"of 25 layers: layer0 .*layer19 \(w2a8\) and 5 more") as e:
        targets.get("silago/drra").check(layers)
    assert "layer20" not in str(e.value)


def test_one_precision_for_all_layers_is_refused_in_a_word() -> None:
    layers = {f"layer{number}": Precision(2, 8) for number in range(25)}
    with pytest.raises(PlanError) as raised:
        targets.get("silago/drra").check(layers)
    assert raised.value.what == "silago/drra cannot do the precision w2a8"


def test_formats_of_activations_are_refused_where_there_is_no_decoder() -> None:
    eyeriss = targets.get("bitfusion/eyeriss")
    with pytest.raises(PlanError) as refused:
        eyeriss.check({"conv1": Precision.parse("w8a8"), "conv2": Precision.parse("w8a8se8")})
    assert str(refused.value) == (
        "plan: bitfusion/eyeriss cannot do the precision of 1 layer: conv2 (w8a8se8)\n"
        "  it allows weights of 2, 4, 8, 16 bits with activations of 2, 4, 8, 16 bits; it decodes "
        "no soft-edge activations"
    )
    layer = Layer.matmul(rows=1, in_features=2, out_features=3, name="fc")
    with pytest.raises(PlanError, match=r"layer 'fc': bitfusion/eyeriss cannot do .* w8a8se\n"):
        eyeriss.cost(layer, "w8a8se")


def test_formats_of_activations_that_an_accelerator_has(tmp_path: Path) -> None:
    systolic = targets.get("generic/systolic")
    assert [
        str(p) for p in systolic.soft_edge_precisions
    ] == "w4a8se w4a8se8 w8a8se w8a8se8".split()
    # They are used where they are asked for.
    assert not any(p.activation_format != "int" for p in systolic.allowed_precisions)
    systolic.check({"fc": Precision.parse("w4a8se8")})
    with pytest.raises(
        PlanError, match="with activations of 4, 8 bits, and activations a8se, a8se8"
    ):
        systolic.check({"fc": Precision.parse("w4a8se6")})
    forms = {"u": "a16", "dt": "a8se8", "B": "a4", "C": "a8se6"}
    scan_inputs = {name: Activation.parse(text) for name, text in forms.items()}
    with pytest.raises(PlanError, match=r"cannot decode.*read: C \(a8se6\)\n.*a8se, a8se8"):
        systolic.check({}, scan_inputs=scan_inputs)
    del scan_inputs["C"]
    systolic.check({}, scan_inputs=scan_inputs)
    with pytest.raises(PlanError, match=r"cannot decode.*read: dt \(a8se8\)\n.*no soft-edge"):
        targets.get("bitfusion/eyeriss").check({}, scan_inputs=scan_inputs)
    formats = {"precisions.activation_formats": ["int", "soft-edge8", "soft-edge4"]}
    fusion = targets.get(changed(tmp_path, "bitfusion/eyeriss", formats))
    layer = Layer.matmul(rows=16, in_features=64, out_features=16)  # read once
    # A fusion unit takes as long as with 16 bits, and memory moves as many as with 8, or with 4.
    costs = {
        text: fusion.cost(layer, f"w8{text}") for text in ("a4", "a8", "a16", "a8se8", "a4se4")
    }
    for form, stored in (("a8se8", "a8"), ("a4se4", "a4")):
        assert costs[form].peak_macs_per_cycle == costs["a16"].peak_macs_per_cycle
        assert costs[form].dram_read_bits == costs[stored].dram_read_bits


@pytest.mark.parametrize(
    "formats, what",
    [
        (["soft-edge8"], "int must be among activation_formats"),
        (["int", "int"], "a format stands twice"),
        (["int", "soft-edge4"], "soft-edge4 needs activation_bits of 4"),
        (["int", "soft"], "activation_formats"),
    ],
)
def test_wrong_formats_in_a_description(formats: list[str], what: str, tmp_path: Path) -> None:
    values = {"precisions.activation_formats": formats, "precisions.activation_bits": [8]}
    with pytest.raises(UsageError, match=what):
        targets.get(changed(tmp_path, "bitfusion/eyeriss", values))


def test_tvm_target() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    for _ in range(2):  # TVM refuses to register a tag twice
        target = accelerator.tvm_target({"kind": "llvm", "mcpu": "x86-64-v3"})
        assert target.kind.name == "llvm"
        exported = target.export()
        assert exported["tag"] == "bitfusion/eyeriss"
        assert exported["mcpu"] == "x86-64-v3"
        assert list(exported["keys"]) == ["bitfusion", "cpu"]
        assert exported["model"] == "eyeriss"


@pytest.mark.parametrize("name", sorted(targets.available()))
def test_every_accelerator_is_a_target_of_tvm(name: str) -> None:
    from tvm.target import Target

    import bitwright.targets.codegen  # noqa: F401 - which makes them known

    target = Target(name)
    family, _, model = name.partition("/")
    assert list(target.keys) == [family if family != "generic" else "systolic", "cpu"]
    assert str(target.export()["model"]) == (model if family != "generic" else "generic")


def test_a_name_that_tvm_has_already(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml", name="nvidia/geforce-rtx-3070"))
    with pytest.raises(UsageError, match="TVM has another target"):
        accelerator.tvm_target()


# -- layers and memory ---------------------------------------------------------------------------

CONV = Layer.conv(in_channels=4, out_channels=8, kernel=3, output=5, name="conv")
VECTOR = Layer.matmul(rows=1, in_features=100, out_features=10, name="vector")


def test_kinds_of_layers_that_an_accelerator_lacks(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml", layer_kinds=["conv"]))
    plan = {"conv": Precision(8, 8), "vector": Precision(8, 8)}
    accelerator.check_kinds([CONV], plan)
    accelerator.check_kinds([CONV, VECTOR], {"conv": Precision(8, 8)})  # the other one is float
    with pytest.raises(PlanError, match=r"cannot compute 1 layer: vector \(matmul\)") as raised:
        accelerator.check_kinds([CONV, VECTOR], plan)
    assert raised.value.fix == "it computes layers of the kinds conv"


def test_a_plan_beyond_the_memory(tmp_path: Path) -> None:
    memory = {"value": 1000, "source": "test"}  # 1,000 weights of the vector fit with 8 bits
    accelerator = targets.get(write(tmp_path / "mine.yaml", weight_memory_bytes=memory))
    accelerator.check_memory([VECTOR], {"vector": Precision(8, 8)})
    plan = {"vector": Precision(8, 8), "conv": Precision(4, 8)}
    with pytest.raises(PlanError) as raised:
        accelerator.check_memory([VECTOR, CONV], plan, where="plan.json")
    assert str(raised.value) == (
        "plan.json: the weights take 1,144 bytes, and the memory of mine/one holds 1,000 bytes\n"
        "  give large layers fewer bits: vector (w8a8, 1,000 bytes), conv (w4a8, 144 bytes)"
    )


# -- costs ---------------------------------------------------------------------------------------


def test_no_cost_model(tmp_path: Path) -> None:
    accelerator = targets.get(write(tmp_path / "mine.yaml"))
    assert accelerator.frequency_mhz is None
    with pytest.raises(UsageError, match="mine/one has no cost model"):
        accelerator.cost(CONV, Precision(8, 8))


def test_costs_of_what_an_accelerator_cannot_do() -> None:
    with pytest.raises(PlanError, match=r"layer 'conv': silago/drra cannot do the precision"):
        targets.get("silago/drra").cost(CONV, Precision(4, 8))
    with pytest.raises(UsageError, match="no option 'im2col'"):
        targets.get("silago/drra").cost(CONV, Precision(4, 4), im2col=True)
    scan = Layer(name="s", kind="scan", batch=1, in_channels=4, out_channels=4)
    with pytest.raises(UsageError, match="no cost for layers of the kind 'scan'"):
        targets.get("silago/drra").cost(scan, Precision(4, 4))
    unknown = dataclasses.replace(CONV, output=(None, 5))
    with pytest.raises(UsageError, match="its sizes are not known") as raised:
        targets.get("silago/drra").cost(unknown, Precision(4, 4))
    assert "--input-shape" in str(raised.value)


def test_a_model_costs_the_sum_of_its_layers() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    plan = {"conv": Precision(2, 8), "vector": Precision(16, 4)}
    total = accelerator.model_cost([CONV, VECTOR], plan)
    single = [accelerator.cost(layer, plan[layer.name]) for layer in (CONV, VECTOR)]
    assert total.layers == tuple(single)
    for name in ("macs", "cycles", "stall_cycles", "dram_read_bits", "dram_write_bits", "seconds"):
        assert getattr(total, name) == sum(getattr(cost, name) for cost in single)
    assert total.total_energy_pj == pytest.approx(sum(c.total_energy_pj or 0 for c in single))
    assert total.memory_bits == 288 * 2 + 1000 * 16
    assert total.relative_cycles is None
    assert total.fits
    assert accelerator.model_cost([CONV, VECTOR], PrecisionPlan(layers=plan)) == total


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"conv": Precision(8, 8)}, "has no precision for 1 layer: vector"),
        (
            dict.fromkeys(("conv", "vector", "other"), Precision(8, 8)),
            "names what is not in the model: 1 layer: other",
        ),
    ],
)
def test_plans_of_other_models(plan: dict[str, Precision], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        targets.get("silago/drra").model_cost([CONV, VECTOR], plan)


def test_layers_of_one_name_are_refused() -> None:
    layers = [Layer.matmul(rows=1, in_features=2048, out_features=1024) for _ in range(5)]
    accelerator = targets.get("silago/drra")
    with pytest.raises(PlanError, match="two layers have the name 'matmul'"):
        accelerator.model_cost(layers, Precision(8, 8))
    with pytest.raises(PlanError, match="the weights take 10,485,760 bytes"):
        accelerator.check_memory(layers, {"matmul": Precision(8, 8)})


def test_precisions_may_be_texts() -> None:
    accelerator = targets.get("bitfusion/eyeriss")
    assert accelerator.cost(CONV, "w4a8") == accelerator.cost(CONV, Precision(4, 8))
    assert accelerator.model_cost([CONV], "w4a8") == accelerator.model_cost(
        [CONV], {"conv": Precision(4, 8)}
    )


@pytest.mark.parametrize("name", sorted(targets.available()))
def test_accelerators_go_to_other_processes(name: str) -> None:
    accelerator = targets.get(name)
    copied = pickle.loads(pickle.dumps(accelerator))  # noqa: S301 - our own, of a moment ago
    assert copied == accelerator
    if name != "bitfusion/zigzag":
        precision = accelerator.allowed_precisions[0]
        assert copied.cost(VECTOR, precision) == accelerator.cost(VECTOR, precision)


def test_energy_of_vectors_that_a_model_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "vector_costs.py").write_text(
        "from bitwright import LayerCost\n"
        "from bitwright.targets import CostModel\n"
        "class Vectors(CostModel):\n"
        "    def layer_cost(self, layer, precision):\n"
        "        return LayerCost.of(layer, precision, cycles=1)\n"
        "    def memory_energy_pj(self, bits):\n"
        "        raise KeyError('bits')\n"
    )
    accelerator = targets.get(write(tmp_path / "mine.yaml", cost={"model": "vector_costs:Vectors"}))
    with pytest.raises(RunError, match="the cost model of mine/one fails"):
        accelerator.model_cost([CONV], Precision(8, 8))
