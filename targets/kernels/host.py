"""Instruction sets: what kernels are built for, and what this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.errors import UsageError

__all__ = ["AVX2", "GENERIC", "ISAS", "Isa", "detect", "find", "target"]


@dataclass(frozen=True, slots=True)
class Isa:
    """What a kernel needs to know of a processor.

    Attributes
    ----------
    name
        For manifests and messages.
    lanes
        32-bit numbers in a vector register.
    registers
        Vector registers.
    multiply_add
        The LLVM intrinsic that multiplies pairs of int16 and adds the two products to an int32;
        None: plain multiplications, on any processor.
    mcpu
        The processor that LLVM compiles for; None: the least of the host's family.
    round_to_int
        The LLVM intrinsic that rounds a vector of float32 to int32, ties to even; None: rounding
        and conversion by themselves.
    """

    name: str
    lanes: int
    registers: int
    multiply_add: str | None = None
    mcpu: str | None = None
    round_to_int: str | None = None


AVX2 = Isa(
    "avx2",
    lanes=8,
    registers=16,
    multiply_add="llvm.x86.avx2.pmadd.wd",
    mcpu="x86-64-v3",
    round_to_int="llvm.x86.avx.cvt.ps2dq.256",
)
GENERIC = Isa("generic", lanes=4, registers=16)
ISAS = {isa.name: isa for isa in (AVX2, GENERIC)}

# What the level x86-64-v3 adds to the first x86-64 processors, as far as LLVM generates it unasked.
_V3_FEATURES = ["avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"]


def detect() -> Isa:
    """Return the best instruction set of this machine for which there are kernels."""
    from tvm.target import Target, codegen

    if not codegen.llvm_get_system_triple().startswith("x86_64"):
        return GENERIC
    host = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    return AVX2 if codegen.llvm_cpu_has_features(_V3_FEATURES, host) else GENERIC


def find(name: str) -> Isa:
    """Return the instruction set of a name, the best of this machine for an empty one.

    Raises
    ------
    UsageError
        If there is no such instruction set.
    """
    if not name:
        return detect()
    if name not in ISAS:
        raise UsageError(f"there is no instruction set {name!r}", fix="choose " + " or ".join(ISAS))
    return ISAS[name]


def target(isa: Isa) -> dict[str, str]:
    """Return the TVM target, as a dictionary, that an artefact for the instruction set records."""
    return {"kind": "llvm"} if isa.mcpu is None else {"kind": "llvm", "mcpu": isa.mcpu}
