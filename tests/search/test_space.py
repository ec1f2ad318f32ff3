from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bitwright import Precision, targets
from bitwright.errors import PlanError, UsageError
from bitwright.search.space import Plan, Space, make_space, widest

SILAGO = targets.get("silago/drra")  # weights and activations of one width: 4, 8 or 16 bits
BIT_FUSION = targets.get("bitfusion/mohaq")  # each 2, 4, 8 or 16 bits
LAYERS = ("conv1", "conv2", "conv10", "fc")


def precisions(*texts: str) -> tuple[Precision, ...]:
    return tuple(map(Precision.parse, texts))


def all_plans(space: Space) -> list[Plan]:
    """The plans of all genomes."""
    values = [range(len(gene.choices)) for gene in space.genes]
    return [space.plan(genome) for genome in itertools.product(*values)]


# -- genes ---------------------------------------------------------------------------------------


def test_a_layer_has_one_gene_where_the_target_ties_weights_and_activations() -> None:
    space = make_space(LAYERS, SILAGO)
    assert [gene.layers for gene in space.genes] == [(name,) for name in LAYERS]
    for gene in space.genes:
        assert gene.part == "both"
        assert gene.choices == precisions("w4a4", "w8a8", "w16a16")
    assert space.size == 3**4


def test_a_layer_has_two_genes_where_the_target_does_not() -> None:
    space = make_space(LAYERS, BIT_FUSION)
    parts = ("weights", "activations")
    assert [(gene.layers, gene.part) for gene in space.genes] == [
        ((name,), part) for name in LAYERS for part in parts
    ]
    assert all(gene.choices == (2, 4, 8, 16) for gene in space.genes)
    assert space.size == 16**4
    assert space.highest.tolist() == [3] * 8


@pytest.mark.parametrize(
    "chosen, expected",
    [
        # A rectangle of weights and activations.
        (["w8a8", "w4a8", "w4a4", "w8a4"], [(4, 8), (4, 8)]),
        (["w16a4", "w2a4", "w2a8", "w16a8"], [(2, 16), (4, 8)]),
        # No rectangle: pairs, from few bits to many, fewer bits of weights first.
        (["w8a8", "w4a8", "w4a4"], [precisions("w4a4", "w4a8", "w8a8")]),
        (["w8a4", "w4a8", "w2a2"], [precisions("w2a2", "w4a8", "w8a4")]),
        # A rectangle that is a line has nothing to choose in one direction.
        (["w8a8", "w2a8", "w4a8"], [precisions("w2a8", "w4a8", "w8a8")]),
        (["w8a16", "w8a2"], [precisions("w8a2", "w8a16")]),
        # Once is as good as twice.
        (["w8a8", "w4a4", "w8a8"], [precisions("w4a4", "w8a8")]),
    ],
)
def test_candidates_decide_about_genes(chosen: list[str], expected: Sequence[Any]) -> None:
    space = make_space(("only",), BIT_FUSION, precisions=chosen)
    assert [gene.choices for gene in space.genes] == list(expected)
    assert {plan[0] for plan in all_plans(space)} == set(map(Precision.parse, chosen))
    assert set(space.precisions("only")) == set(map(Precision.parse, chosen))


def test_candidates_may_be_precisions_or_texts() -> None:
    texts = make_space(LAYERS, SILAGO, precisions=["w8a8", "w4a4"])
    assert texts == make_space(LAYERS, SILAGO, precisions=[Precision(8, 8), Precision(4, 4)])


def test_genes_have_names_for_tables() -> None:
    names = [g.name for g in make_space(LAYERS, BIT_FUSION, tie=["conv1,conv2,conv10"]).genes]
    assert names == ["conv1 +2 weights", "conv1 +2 activations", "fc weights", "fc activations"]
    assert [g.name for g in make_space(("a", "b"), SILAGO).genes] == ["a", "b"]


# -- what users narrow ---------------------------------------------------------------------------


def test_kept_layers_have_one_precision_and_no_gene() -> None:
    # Also one that is no candidate.
    space = make_space(LAYERS, SILAGO, precisions=["w4a4", "w8a8"], keep={"conv2": "w16a16"})
    assert space.kept == {"conv2": Precision(16, 16)}
    assert space.precisions("conv2") == (Precision(16, 16),)
    assert {plan[1] for plan in all_plans(space)} == {Precision(16, 16)}
    assert space.size == 2**3


def test_excluded_layers_stay_at_the_widest_that_the_target_allows() -> None:
    space = make_space(LAYERS, BIT_FUSION, precisions=["w4a4", "w8a8"], exclude=["conv1", "fc"])
    assert {(plan[0], plan[3]) for plan in all_plans(space)} == {(Precision(16, 16),) * 2}
    assert space.size == 2**2


def test_tied_layers_share_their_genes() -> None:
    space = make_space(LAYERS, BIT_FUSION, precisions=["w2a4", "w4a4"], tie=["fc, conv1"])
    # In order of execution, wherever the user named them.
    assert [gene.layers for gene in space.genes] == [("conv1", "fc"), ("conv2",), ("conv10",)]
    assert all(plan[0] == plan[3] for plan in all_plans(space))
    assert space.size == 2**3


def test_several_groups_are_tied() -> None:
    space = make_space(LAYERS, SILAGO, tie=["conv1,fc", "conv2,conv10"])
    assert [gene.layers for gene in space.genes] == [("conv1", "fc"), ("conv2", "conv10")]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("conv*", {"conv1", "conv2", "conv10"}),
        ("conv?", {"conv1", "conv2"}),
        ("conv1", {"conv1"}),
        ("*c*1*", {"conv1", "conv10"}),
        ("fc", {"fc"}),
    ],
)
def test_patterns_stand_for_layers(pattern: str, names: set[str]) -> None:
    assert set(make_space((*LAYERS, "last"), SILAGO, exclude=[pattern]).kept) == names
    assert set(make_space((*LAYERS, "last"), SILAGO, keep={pattern: "w8a8"}).kept) == names
    tied = make_space((*LAYERS, "last"), SILAGO, tie=[pattern])
    assert names in [set(gene.layers) for gene in tied.genes]


def test_names_with_brackets_stand_for_themselves() -> None:
    names = ("block[0].conv", "block[0].fc", "block0.conv")
    assert set(make_space(names, SILAGO, exclude=["block[0].conv"]).kept) == {names[0]}
    assert set(make_space(names, SILAGO, exclude=["block[0]*"]).kept) == set(names[:2])


def test_a_name_that_looks_like_a_pattern_is_that_layer() -> None:
    names = ("conv*", "conv1", "fc")
    assert set(make_space(names, SILAGO, exclude=["conv*"]).kept) == {"conv*"}


def test_options_that_say_the_same_do_not_contradict() -> None:
    space = make_space(LAYERS, SILAGO, keep={"conv1": "w8a8", "conv*": "w8a8"})
    assert space.kept == dict.fromkeys(LAYERS[:3], Precision(8, 8))
    assert set(make_space(LAYERS, SILAGO, exclude=["fc", "f*"]).kept) == {"fc"}
    tied = make_space(LAYERS, SILAGO, tie=["conv*,conv1"])
    assert tied.genes[0].layers == LAYERS[:3]


@pytest.mark.parametrize(
    "options, where, message",
    [
        ({"keep": {"conv9": "w8a8"}}, "--keep", "no layer is called 'conv9'"),
        ({"exclude": ["pool*"]}, "--exclude", "no layer is called 'pool*'"),
        ({"tie": ["conv1,nothing"]}, "--tie", "no layer is called 'nothing'"),
        ({"tie": ["conv1,"]}, "--tie", "no layer is called ''"),
        ({"keep": {"conv*": "w8a8", "conv1": "w4a4"}}, "--keep", "'conv1' is kept at both"),
        ({"keep": {"fc": "w8a8"}, "exclude": ["f*"]}, "--exclude", "'fc' is kept and excluded"),
        ({"tie": ["conv1,conv2", "conv2,fc"]}, "--tie", "'conv2' is tied twice"),
        ({"tie": ["conv*"], "keep": {"conv2": "w8a8"}}, "--tie", "'conv2' is tied, and kept"),
        ({"tie": ["conv*"], "exclude": ["conv1"]}, "--tie", "'conv1' is tied, and kept"),
        ({"exclude": ["*"]}, None, "every layer is kept"),
        ({"precisions": ["w8a8"]}, None, "each layer has one precision left"),
    ],
)
def test_contradictions_are_refused(
    options: dict[str, Any], where: str | None, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_space(LAYERS, SILAGO, **options)
    assert message in caught.value.what
    assert caught.value.where == where
    assert caught.value.fix


def test_who_misspells_a_layer_is_told_their_names() -> None:
    with pytest.raises(UsageError, match="conv1, conv2, conv10, fc"):
        make_space(LAYERS, SILAGO, exclude=["Conv1"])


@pytest.mark.parametrize(
    "options, where",
    [
        ({"precisions": ["w8a8", "w2a2"]}, "--precisions"),
        ({"precisions": ["w8a4", "w8a8"]}, "--precisions"),
        ({"keep": {"fc": "w4a8"}}, "--keep"),
        ({"keep": dict.fromkeys(LAYERS, "w2a2")}, "--keep"),
    ],
)
def test_precisions_that_the_target_cannot_do_are_refused(
    options: dict[str, Any], where: str
) -> None:
    with pytest.raises(PlanError, match="silago/drra cannot do the precision") as caught:
        make_space(LAYERS, SILAGO, **options)
    assert caught.value.where == where


@pytest.mark.parametrize("options", [{"precisions": ["8bit"]}, {"keep": {"fc": "w3a3"}}])
def test_texts_that_are_no_precisions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make_space(LAYERS, SILAGO, **options)


# -- genomes and plans ---------------------------------------------------------------------------


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """A space of few plans, narrowed in every way."""
    accelerator = draw(st.sampled_from([SILAGO, BIT_FUSION]))
    allowed = accelerator.allowed_precisions
    names = [f"l{number}" for number in range(draw(st.integers(1, 4)))]
    chosen = draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique=True))
    roles = [draw(st.sampled_from(["free", "keep", "exclude", "tie", "tie"])) for _ in names]
    with_role = {
        role: [n for n, r in zip(names, roles, strict=True) if r == role] for role in roles
    }
    keep = {name: draw(st.sampled_from(allowed)) for name in with_role.get("keep", [])}
    assume(len(chosen) > 1 and {"free", "tie"} & set(roles))
    return make_space(
        names,
        accelerator,
        precisions=chosen,
        keep=keep,
        exclude=with_role.get("exclude", []),
        tie=[",".join(with_role["tie"])] if "tie" in with_role else [],
    )


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_genomes_and_plans_are_the_same(space: Space) -> None:
    values = [range(len(gene.choices)) for gene in space.genes]
    genomes = list(itertools.product(*values))
    plans = [space.plan(genome) for genome in genomes]
    assert [space.genome(plan) for plan in plans] == genomes
    assert len(set(plans)) == len(plans) == space.size
    for gene in space.genes:
        for plan in plans:
            assert len({plan[space.layers.index(name)] for name in gene.layers}) == 1
    for number, name in enumerate(space.layers):
        options = space.precisions(name)
        assert {plan[number] for plan in plans} == set(options)
        bits = [p.weight_bits + p.activation_bits for p in options]
        assert bits == sorted(bits)
        if name in space.kept:
            assert options == (space.kept[name],)


@given(spaces(), st.data())
@settings(max_examples=60, deadline=None)
def test_plans_outside_have_no_genome(space: Space, data: st.DataObject) -> None:
    every = BIT_FUSION.allowed_precisions
    plan = tuple(data.draw(st.sampled_from(every)) for _ in space.layers)
    assert (space.genome(plan) is not None) == (plan in all_plans(space))


@given(spaces())
@settings(max_examples=60, deadline=None)
def test_uniform_plans_give_all_chosen_layers_one_precision(space: Space) -> None:
    free = [n for n, name in enumerate(space.layers) if name not in space.kept]
    expected = [plan for plan in all_plans(space) if len({plan[n] for n in free}) == 1]
    found = space.uniform()
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    bits = [plan[free[0]].weight_bits + plan[free[0]].activation_bits for plan in found]
    assert bits == sorted(bits)


@given(st.lists(st.sampled_from(BIT_FUSION.allowed_precisions), min_size=1))
@settings(deadline=None)
def test_the_widest_has_most_bits(entries: list[Precision]) -> None:
    found = widest(entries)
    most = max(p.weight_bits + p.activation_bits for p in entries)
    assert found.weight_bits + found.activation_bits == most
    # Of those with equally many, the one with the finer weights.
    equals = [p for p in entries if p.weight_bits + p.activation_bits == most]
    assert found.weight_bits == max(p.weight_bits for p in equals)


def test_numpy_genomes_are_taken() -> None:
    space = make_space(LAYERS, BIT_FUSION)
    assert space.plan(space.highest) == (Precision(16, 16),) * 4
    assert space.plan(space.highest * 0) == (Precision(2, 2),) * 4


def test_a_space_can_be_written_as_json() -> None:
    space = make_space(LAYERS, SILAGO, keep={"fc": "w8a8"}, tie=["conv1,conv2"])
    document = json.loads(json.dumps(space.to_dict()))
    assert document == {
        "size": 9,
        "layers": list(LAYERS),
        "genes": [
            {
                "layers": ["conv1", "conv2"],
                "part": "both",
                "choices": ["w4a4", "w8a8", "w16a16"],
            },
            {"layers": ["conv10"], "part": "both", "choices": ["w4a4", "w8a8", "w16a16"]},
        ],
        "kept": {"fc": "w8a8"},
    }
    assert make_space(("a",), BIT_FUSION).to_dict()["genes"][0]["choices"] == [2, 4, 8, 16]


def test_formats_are_choices_where_they_are_asked_for() -> None:
    target = targets.get("generic/systolic")
    plain = make_space(["a", "b"], target)
    assert [gene.choices for gene in plain.genes] == [(4, 8)] * 4
    texts = ["w8a8se", "w4a8", "w8a8", "w4a8se8", "w8a8se8", "w4a8se"]
    space = make_space(["a", "b"], target, precisions=texts)
    assert [gene.part for gene in space.genes] == ["weights", "activations"] * 2
    # From coarse to fine.
    assert [str(choice) for choice in space.genes[1].choices] == ["a8", "a8se8", "a8se"]
    assert space.genes[1].to_dict()["choices"] == ["a8", "a8se8", "a8se"]
    assert space.size == 6 * 6
    for genome in itertools.product(*(range(len(gene.choices)) for gene in space.genes)):
        assert space.genome(space.plan(genome)) == genome
    assert {str(plan[0]) for plan in space.uniform()} == set(texts)
    assert space.genome((Precision(4, 4), Precision(8, 8))) is None
    assert space.genome((Precision.parse("w8a8se6"), Precision(8, 8))) is None


def test_formats_of_some_widths_share_one_gene_a_layer() -> None:
    target = targets.get("generic/systolic")
    space = make_space(["a"], target, precisions=["w8a8", "w8a8se8", "w4a8"])
    assert [(gene.part, [str(c) for c in gene.choices]) for gene in space.genes] == [
        ("both", ["w4a8", "w8a8", "w8a8se8"])
    ]


def test_a_target_without_the_format_refuses_it() -> None:
    with pytest.raises(PlanError, match="bitfusion/eyeriss cannot do the precision w8a8se") as e:
        make_space(["a"], targets.get("bitfusion/eyeriss"), precisions=["w8a8", "w8a8se"])
    assert "it decodes no soft-edge activations" in str(e.value)
