"""Artefacts that count transitions, and the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import bitwright
from bitwright import Artifact, targets
from bitwright.cli import main
from bitwright.errors import ArtifactError, DataError, UsageError
from bitwright.tables import print_transitions
from bitwright.targets.link import ROW_MAJOR, UNSORTED, Part
from bitwright.transitions import LayerTransitions, PartTransitions, Sent, Transitions
from tests.quant.qdq import Array

LENET = Path(__file__).resolve().parents[2] / "examples" / "lenet_digits"
LAYERS = ["conv1", "conv2", "fc1", "fc2", "fc3"]
ORDER = "popcount=on:inputs:buckets:4:map:quantile"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(LENET / "calibration.npz") as archive:
        np.savez(path, image=archive["image"][:20])
    return path


@pytest.fixture(scope="module")
def images() -> Array:
    with np.load(LENET / "test.npz") as archive:
        return np.asarray(archive["image"][:7], np.float32)


def compiled(output: Path, calibration: Path, passes: str = "", **options: Any) -> Artifact:
    given = {"precision": "w8a8", "calibration": calibration, "passes": passes, **options}
    return bitwright.compile(LENET / "lenet.onnx", "generic/systolic", output=output, **given)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Artifact:
    folder = tmp_path_factory.mktemp("counting")
    options = "on:inputs:buckets:4:map:quantile"
    passes = f"materialize-transfers=link:ordering-simulator,popcount-reorder={options}"
    return compiled(folder / "lenet", few, passes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Artifact:
    return compiled(tmp_path_factory.mktemp("plain") / "lenet", few)


def test_the_manifest_tells_of_the_link(counting: Artifact) -> None:
    entry = counting.manifest.link
    assert entry is not None
    assert entry.link == targets.get_link("ordering-simulator")
    assert [layer.name for layer in entry.layers] == LAYERS
    assert {layer.order for layer in entry.layers} == {ORDER}
    assert {layer.sorted_by_unit for layer in entry.layers} == {("inputs",)}
    assert [layer.terms for layer in entry.layers] == [25, 150, 400, 120, 84]
    assert entry.batched
    assert entry.skipped == {}
    assert [parameter.name for parameter in entry.parameters if "table" in parameter.name] == [
        f"{name}.table" for name in LAYERS
    ]
    names = [entry.name for entry in counting.manifest.passes]
    assert names.index("materialize-transfers") + 1 == names.index("popcount-reorder")
    assert "link.params" in counting.manifest.files


def test_main_is_the_same_without_transfers(
    counting: Artifact, plain: Artifact, images: Array
) -> None:
    assert plain.manifest.link is None
    assert "link.params" not in plain.manifest.files
    assert counting.manifest.parameters == plain.manifest.parameters
    files = counting.manifest.files, plain.manifest.files
    assert files[0]["model.params"] == files[1]["model.params"]
    np.testing.assert_array_equal(
        counting.run({"image": images})["logits"], plain.run({"image": images})["logits"]
    )


def test_counts_are_those_of_the_reference(counting: Artifact, few: Path, images: Array) -> None:
    """``bitwright link`` runs the quantized model in NumPy, sample by sample."""
    found = counting.count_transitions({"image": images})
    assert (found.samples, found.orders, found.skipped) == (7, (ORDER,), {})
    expected = bitwright.link(
        counting.folder,
        {"image": images},
        link="ordering-simulator",
        orders=[ORDER],
        calibration=few,
    )
    assert [layer.layer for layer in found.layers] == LAYERS
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert set(mine.sent) == {ROW_MAJOR, UNSORTED, ORDER}
        for order, sent in mine.sent.items():
            assert sent.parts.keys() == theirs.sent[order].parts.keys()
            for part, counts in sent.parts.items():
                other = theirs.sent[order].parts[part]
                assert counts.flits == other.flits
                np.testing.assert_array_equal(counts.transitions, other.transitions)
            assert sent.words_sorted == theirs.sent[order].words_sorted


def test_counts_do_not_depend_on_batches(counting: Artifact, images: Array) -> None:
    done: list[tuple[int, int]] = []
    each = counting.count_transitions(
        {"image": images}, batch_size=1, progress=lambda *entry: done.append(entry)
    )
    assert done == [(number, 7) for number in range(1, 8)]
    all_ = counting.count_transitions({"image": images}, batch_size=7)
    assert each.to_dict() == all_.to_dict()


def test_artefacts_without_transfers_say_how_to_get_them(plain: Artifact, images: Array) -> None:
    with pytest.raises(ArtifactError, match="without transfers") as raised:
        plain.count_transitions({"image": images})
    assert "--passes popcount-reorder" in str(raised.value)


def test_wrong_data_is_refused(counting: Artifact, images: Array) -> None:
    with pytest.raises(UsageError, match="batch size 0"):
        counting.count_transitions({"image": images}, batch_size=0)
    with pytest.raises(DataError, match="does not fit"):
        counting.count_transitions({"image": images[:, :, :5]})


def test_link_parameters_are_checked(counting: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(counting.folder, tmp_path / "copy"))
    content = bytearray((copy / "link.params").read_bytes())
    content[-1] ^= 1
    (copy / "link.params").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"link\.params: is damaged"):
        bitwright.load_artifact(copy)
    (copy / "link.params").unlink()
    with pytest.raises(ArtifactError, match=r"link\.params: is missing"):
        bitwright.load_artifact(copy)


# -- auto ------------------------------------------------------------------------------------------


def with_price(folder: Path, pj_per_word: float) -> Path:
    """The accelerator with a sorting unit that spends that on a word."""
    description = targets.get("generic/systolic").model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    description["link"]["energy_pj_per_word"] = {
        "value": pj_per_word,
        "source": description["link"]["source"],
    }
    path = folder / f"priced{pj_per_word:g}.yaml"
    path.write_text(yaml.safe_dump(description), encoding="utf-8")
    return path


def test_auto_decides_layer_by_layer_on_the_calibration_samples(
    tmp_path: Path, few: Path, images: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    target = with_price(tmp_path, 0.1)
    got = bitwright.compile(
        LENET / "lenet.onnx",
        target,
        precision="w8a8",
        calibration=few,
        passes="popcount-reorder=auto:true:key:popcount:on:inputs:snake:false",
        output=tmp_path / "out",
    )
    entry = got.manifest.link
    assert entry is not None
    measured = bitwright.link(got.folder, few, link=target, orders=["popcount=on:inputs"])
    for layer in entry.layers:
        sent = measured[layer.name]
        net = measured.net_saved_pj(sent["popcount=on:inputs"], sent[UNSORTED])
        assert net is not None
        assert (layer.order == "popcount=on:inputs") == (net > 0)
        assert layer.reason.startswith("reordered" if net > 0 else "left unsorted")
    # It says so again where it is counted.
    found = got.count_transitions({"image": images})
    assert [layer.reason for layer in found.layers] == [layer.reason for layer in entry.layers]
    code, out, _ = run(capsys, "passes", got.folder)
    assert code == 0
    for layer in entry.layers:
        assert " ".join(layer.reason.split()[:2]) in out
    assert bitwright.describe_passes(got.folder).to_dict()["link"] == entry.model_dump(mode="json")


def test_auto_needs_samples_and_prices(tmp_path: Path, few: Path, plain: Artifact) -> None:
    with pytest.raises(UsageError, match=r"layer 'conv1'.*none were measured"):
        bitwright.compile(
            plain.qdq_model or "",
            "generic/systolic",
            passes="popcount-reorder=auto:true",
            output=tmp_path / "out",
        )
    with pytest.raises(UsageError, match=r"layer 'conv1'.*no energy_pj_per_word"):
        compiled(tmp_path / "out", few, "popcount-reorder=auto:true:on:inputs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "passes, message",
    [
        ("popcount-reorder=window:26", "layer 'conv1': a window of 26 is larger than the 25 terms"),
        ("popcount-reorder=key:popcount:map:0.0.1.1", "layer 'conv1': .*has 4 entries"),
        ("popcount-reorder=key:nearest", "no unit"),
        ("materialize-transfers=link:none", "no link 'none'"),
    ],
)
def test_orders_that_cannot_be_are_refused(
    passes: str, message: str, tmp_path: Path, few: Path
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        compiled(tmp_path / "out", few, passes)
    assert raised.value.exit_code == 2
    assert raised.value.fix
    assert not (tmp_path / "out").exists()


def test_codes_wider_than_words_are_refused(tmp_path: Path, few: Path) -> None:
    with pytest.raises(UsageError, match=r"layer 'conv1': activations have 16 bits.*words 8"):
        bitwright.compile(
            LENET / "lenet.onnx",
            "bitfusion/eyeriss",
            precision="w8a16",
            calibration=few,
            passes="materialize-transfers=link:ordering-simulator",
            output=tmp_path / "out",
        )


# -- the command -----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(list(map(str, words)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_layers_parts_and_shares(
    counting: Artifact, few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", counting.folder, "--data", few, "--count-transitions"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    found = counting.count_transitions(few)
    for layer in found.layers:
        assert layer.layer in out
        for sent in layer.sent.values():
            assert f"{sent.transitions:,}" in out
    assert f"{found.total(ORDER).words_sorted:,}" in out
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(found.to_dict()))


def test_the_command_compares_nothing_meanwhile(
    counting: Artifact, plain: Artifact, few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", counting.folder, "--data", few, "--count-transitions"]
    for more in (
        ["--metric", "mse"],
        ["--metric", "top1"],  # also what is the default elsewhere
        ["--reference"],
        ["--no-reference"],
        ["--float", LENET / "lenet.onnx"],
    ):
        code, out, err = run(capsys, *words, *more)
        assert (code, out) == (2, "")
        assert "compares nothing" in err
    code, out, err = run(capsys, "run", plain.folder, "--data", few, "--count-transitions")
    assert (code, out) == (2, "")
    assert re.search("without transfers.*\n.*--passes popcount-reorder", err)


# -- the report ------------------------------------------------------------------------------------


def part(flits: int, *counts: int) -> PartTransitions:
    return PartTransitions(flits, np.array([counts], np.int64))


def test_totals_energies_and_shares() -> None:
    link = targets.get_link("ordering-simulator")  # 0.173 pJ a transition
    first = LayerTransitions(
        "first",
        {
            ROW_MAJOR: Sent({"inputs": part(3, 10, 20), "weights": part(3, 30, 40)}),
            UNSORTED: Sent({"inputs": part(3, 10, 10), "weights": part(3, 20, 10)}),
            "popcount": Sent({"inputs": part(3, 5, 5), "weights": part(3, 5, 10)}, 7),
        },
    )
    second = LayerTransitions(
        "second",
        {
            ROW_MAJOR: Sent({"inputs": part(1, 1, 1), "weights": part(1, 1, 1)}),
            UNSORTED: Sent({"inputs": part(1, 1, 1), "weights": part(1, 1, 1)}),
        },
        "left unsorted",
    )
    report = Transitions("model", 2, link, ("popcount",), (first + first, second), {"x": "float"})
    # Twice 25 of the first layer; the second does not have the order and is sent unsorted.
    total = report.total("popcount")
    assert total.transitions == 2 * 25 + 4
    assert report.total(ROW_MAJOR).transitions == 2 * 100 + 4
    assert (total.words_sorted, total.needs_unit) == (14, True)
    assert report.energy_pj(total) == pytest.approx(0.173 * 54)
    assert report.unit_energy_pj(total) is None
    assert report.unit_energy_pj(report.total(UNSORTED)) == 0
    assert report.saved(total, report.total(UNSORTED)) == pytest.approx(1 - 54 / 104)
    printed = report.to_dict()
    assert printed["total"]["popcount"]["transitions"] == 54
    assert printed["layers"][0]["sent"]["popcount"]["parts"]["weights"] == {
        "flits": 6,
        "transitions": 30,
        "per_lane_and_bit": [[10, 20]],
    }
    assert printed["skipped"] == {"x": "float"}


def test_a_bound_has_no_net_savings(capsys: pytest.CaptureFixture[str]) -> None:
    link = targets.get_link("ordering-simulator")
    plain = Sent({"inputs": part(3, 10, 20), "weights": part(3, 30, 40)})
    better: dict[Part, PartTransitions] = {"inputs": part(3, 5, 5), "weights": part(3, 5, 10)}
    sent = {
        ROW_MAJOR: plain,
        UNSORTED: plain,
        "nearest": Sent(better, bound=True),
        "chain": Sent(better),
        "popcount=on:inputs": Sent(better, 7),
    }
    layer = LayerTransitions("layer", sent)
    report = Transitions("model", 2, link, tuple(sent)[2:], (layer + layer,), {})
    total, unsorted = report.total("nearest"), report.total(UNSORTED)
    assert report.saved(total, unsorted) == pytest.approx(0.75)
    assert report.unit_energy_pj(total) is None
    assert report.net_saved_pj(total, unsorted) is None
    assert report.net_saved_pj(report.total("chain"), unsorted) == pytest.approx(0.173 * 150)
    print_transitions(report)
    out = capsys.readouterr().out
    assert "known at compile time, without a unit: chain\n" in out
    row = next(
        line for line in reversed(out.splitlines()) if "nearest" in line and "bound" not in line
    )
    assert [entry.strip() for entry in row.split("│")][-5:-1] == ["-"] * 4
