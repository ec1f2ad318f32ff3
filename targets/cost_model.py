"""What a cost model is: parameters, which a description gives, and the cost of one layer."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import ClassVar, Final, Union, get_args, get_origin

from bitwright.errors import UsageError, first_line
from bitwright.targets.schema import Clock, Data, Number
from bitwright.vocabulary import Layer, LayerCost, LayerKind, Precision

__all__ = ["MODELS", "CostModel", "load_model"]

# The models that come with bitwright, found like those of others: by module and class.
MODELS: Final = {
    "bitfusion": "bitwright.targets.bitfusion:BitFusion",
    "precision-table": "bitwright.targets.precision_table:PrecisionTable",
    "systolic": "bitwright.targets.systolic:SystolicArray",
    "zigzag": "bitwright.targets.zigzag:ZigZag",
}


class CostModel(Data, ABC):
    """Base of all cost models.

    A subclass declares its parameters as fields, with the unit in the name, and says what one layer
    costs. A description gives the values under ``cost``, next to ``model``, which names the class.

    Attributes
    ----------
    model
        One of :data:`MODELS`, or ``package.module:Class``.
    frequency_mhz
        Clock; None where the model knows no time.
    kinds
        Kinds of layers whose cost the model knows.
    monotone
        Quantities that never fall as bits rise, where channels fill the array.
    """

    kinds: ClassVar[tuple[LayerKind, ...]] = ("conv", "matmul", "recurrent")
    monotone: ClassVar[tuple[str, ...]] = ("cycles", "relative_cycles", "total_energy_pj")

    model: str
    frequency_mhz: Number[Clock] | None = None

    @abstractmethod
    def layer_cost(self, layer: Layer, precision: Precision) -> LayerCost:
        """Cost of one layer.

        Parameters
        ----------
        layer
            A layer of one of ``kinds`` whose sizes are all known.
        precision
            One that the accelerator allows.

        Returns
        -------
        LayerCost
            Made with :meth:`bitwright.LayerCost.of`. ``seconds`` may be left out: it follows from
            ``cycles`` and the clock.
        """

    def memory_energy_pj(self, bits: int) -> float | None:  # noqa: ARG002 - for models that know it
        """Energy, in picojoules, of loading values beside the weights; None if not defined."""
        return None

    def check_precisions(
        self,
        precisions: frozenset[Precision],  # noqa: ARG002 - for models with tables
    ) -> tuple[str, str] | None:
        """Say which field does not fit the precisions that are allowed, and why; None if all do."""
        return None

    @property
    def digest(self) -> str | None:
        """Hash of code and parameters: equal digests mean equal costs.

        The code is that of the files that define the class and its bases, as they were when they
        were imported; a model that depends on more overrides this. None where there is no file:
        then costs are not kept.
        """
        kinds = [kind for kind in type(self).__mro__ if issubclass(kind, CostModel)]
        code = [kind._code for kind in kinds]
        if None in code:
            return None
        content = [type(self).__qualname__, code, self.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    _code: ClassVar[str | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        cls._code = source_hash(cls.__module__)

    def __reduce__(self) -> tuple[object, ...]:
        # The classes of generic fields have no name to be found by.
        return type(self).model_validate, (self.model_dump(mode="json"),)


def source_hash(module: str) -> str | None:
    """Hash of the file of a module; None where there is none, as in an interactive session."""
    try:
        return hashlib.sha256(Path(str(sys.modules[module].__file__)).read_bytes()).hexdigest()
    except (KeyError, AttributeError, OSError):
        return None


CostModel._code = source_hash(__name__)


def load_model(name: str, folder: Path | None = None) -> type[CostModel]:
    """Find the class of a cost model.

    Parameters
    ----------
    name
        One of :data:`MODELS`, or ``package.module:Class``.
    folder
        Where a module of one file may lie besides the installed ones: beside a description.

    Raises
    ------
    UsageError
        If there is no such class, its module cannot be imported, or it is no complete cost model.
    """
    path = MODELS.get(name, name)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path) is None:
        raise UsageError(
            f"there is no cost model {name!r}",
            fix=f"choose one of {', '.join(MODELS)}, or write package.module:Class",
        )
    module, _, attribute = path.partition(":")
    file = None if folder is None or name in MODELS else folder / f"{module}.py"
    try:
        loaded = _load_file(file) if file is not None and file.is_file() else import_module(module)
        found = getattr(loaded, attribute)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module of others may raise anything
        raise UsageError(f"cost model {name!r} cannot be loaded ({first_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, CostModel)):
        raise UsageError(
            f"{name!r} is no cost model",
            fix="a cost model is a subclass of bitwright.targets.CostModel",
        )
    if missing := sorted(found.__abstractmethods__):
        raise UsageError(f"cost model {name!r} does not define {missing[0]}")
    for parameter, field in found.model_fields.items():
        if parameter != "model" and not _is_number(field.annotation):
            raise UsageError(
                f"parameter {parameter!r} of cost model {name!r} has no source",
                fix=f"declare it as {parameter}: Number[Count], Number[Positive] or the like",
            )
    return found


def _is_number(annotation: object) -> bool:
    """Whether an annotation is ``Number[...]`` or ``Number[...] | None``."""
    union = get_origin(annotation) in (Union, UnionType)
    parts = get_args(annotation) if union else (annotation,)
    kinds = [part for part in parts if part is not NoneType]
    return len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Number)


def _load_file(path: Path) -> ModuleType:
    """Run a file that lies beside a description, as a module that only this file can be."""
    content = path.read_bytes()
    place = f"{path.absolute()}\n".encode()
    name = f"{path.stem}_{hashlib.sha256(place + content).hexdigest()[:16]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module  # where pydantic looks annotations up
        try:
            exec(compile(content, str(path), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
