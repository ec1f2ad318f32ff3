"""What a cost model is: parameters, which a description gives, and the cost of one layer."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Final

from bitwright.errors import UsageError, first_line
from bitwright.targets.schema import Data, Number, Positive
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
    version
        Rises whenever the model gives other numbers, so that costs kept on disk are not used.
    """

    kinds: ClassVar[tuple[LayerKind, ...]] = ("conv", "matmul", "recurrent")
    monotone: ClassVar[tuple[str, ...]] = ("cycles", "relative_cycles", "total_energy_pj")
    version: ClassVar[int] = 1

    model: str
    frequency_mhz: Number[Positive] | None = None

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

    def check_precisions(self, precisions: frozenset[Precision]) -> str | None:  # noqa: ARG002
        """Say what is wrong if the parameters do not fit the precisions that are allowed."""
        return None

    @property
    def digest(self) -> str:
        """Hash of class, version and parameters: equal digests mean equal costs."""
        kind = type(self)
        parameters = self.model_dump(mode="json")
        content = [kind.__module__, kind.__qualname__, kind.version, parameters]
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
        If there is no such class, or its module cannot be imported.
    """
    path = MODELS.get(name, name)
    module, separator, attribute = path.partition(":")
    if not separator:
        raise UsageError(
            f"there is no cost model {name!r}",
            fix=f"choose one of {', '.join(MODELS)}, or write package.module:Class",
        )
    inserted = None if folder is None else os.fspath(folder.absolute())
    if inserted is not None:
        sys.path.insert(0, inserted)
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # a module of others may raise anything
        raise UsageError(f"cost model {name!r} cannot be loaded ({first_line(error)})") from error
    finally:
        if inserted is not None:
            sys.path.remove(inserted)
    if not (isinstance(found, type) and issubclass(found, CostModel)):
        raise UsageError(
            f"{name!r} is no cost model",
            fix="a cost model is a subclass of bitwright.targets.CostModel",
        )
    return found
