"""What a cost model is: parameters, which a description gives, and the cost of one layer."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Final

from pydantic import BaseModel

from bitwright.errors import UsageError, first_line
from bitwright.targets.schema import Clock, Data, Number, parts_of
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
    def digest(self) -> str:
        """Hash of code and parameters: equal digests mean equal costs."""
        classes = [kind for kind in type(self).__mro__ if issubclass(kind, CostModel)]
        files = [Path(inspect.getfile(kind)).read_bytes() for kind in classes]
        code = [hashlib.sha256(content).hexdigest() for content in files]
        content = [type(self).__qualname__, code, self.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_model(name: str, folder: Path | None = None) -> type[CostModel]:
    """Find the class of a cost model.

    Parameters
    ----------
    name
        One of :data:`MODELS`, or ``package.module:Class``.
    folder
        Where a module may lie besides the installed ones: beside a description of the user.

    Raises
    ------
    UsageError
        If there is no such class, its module cannot be imported, or it is no complete cost model.
    """
    path = MODELS.get(name, name)
    module, separator, attribute = path.partition(":")
    if not separator:
        raise UsageError(
            f"there is no cost model {name!r}",
            fix=f"choose one of {', '.join(MODELS)}, or write package.module:Class",
        )
    try:
        file = None if folder is None else folder / f"{module.replace('.', '/')}.py"
        loaded = _load_file(file) if file is not None and file.is_file() else import_module(module)
        found = getattr(loaded, attribute)
    except (Exception, SystemExit) as error:  # a module of others may raise anything
        raise UsageError(f"cost model {name!r} cannot be loaded ({first_line(error)})") from error
    if not (isinstance(found, type) and issubclass(found, CostModel)):
        raise UsageError(
            f"{name!r} is no cost model",
            fix="a cost model is a subclass of bitwright.targets.CostModel",
        )
    if missing := sorted(found.__abstractmethods__):
        raise UsageError(f"cost model {name!r} does not define {missing[0]}")
    for parameter, field in found.model_fields.items():
        if parameter != "model" and Number not in map(_origin, parts_of(field.annotation)):
            raise UsageError(
                f"parameter {parameter!r} of cost model {name!r} has no source",
                fix=f"declare it as {parameter}: Number[Count], Number[Positive] or the like",
            )
    return found


def _origin(kind: type[BaseModel]) -> type[BaseModel]:
    """The generic model that a model was made from."""
    origin = kind.__pydantic_generic_metadata__["origin"]
    return kind if origin is None else origin


def _load_file(path: Path) -> ModuleType:
    """Import a file that lies beside a description, under a name that only this content has."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    name = f"{path.stem}_{content}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    folder = os.fspath(path.parent.absolute())
    sys.path.insert(0, folder)  # what it imports itself may lie there too
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
