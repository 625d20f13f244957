"""The known steps: an unbroken chain that ends at the format that this version uses."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from casbackup.spec.config import FORMAT
from casbackup_migrations import steps as steps_package
from casbackup_migrations.steps.step import Step

_STEP_MODULE = re.compile(r"from_([0-9]+)_to_([0-9]+)")


@dataclass(frozen=True, slots=True)
class Registry:
    """Steps in order, and the format where they lead.

    :raise ValueError: when they are no chain to that format: a fault of the program.
    """

    steps: tuple[Step, ...]
    format: int

    def __post_init__(self) -> None:
        if [step.from_format for step in self.steps] != list(range(self.oldest, self.format)):
            raise ValueError(f"the steps of migration do not lead one by one to format {self.format}")

    @property
    def oldest(self) -> int:
        """The oldest format there was."""
        return self.steps[0].from_format if self.steps else self.format

    def steps_from(self, found: int) -> tuple[Step, ...]:
        """What takes format ``found``, which must not be older than ``oldest``, to ``format``."""
        return self.steps[found - self.oldest :]


@cache
def current() -> Registry:
    """The steps of this version of casbackup."""
    return Registry(discover(steps_package), FORMAT)


def discover(package: ModuleType) -> tuple[Step, ...]:
    """The ``STEP`` of each module ``from_N_to_M`` of a package, by format.

    :raise ValueError: when a step is not what its module's name says.
    """
    found: list[Step] = []
    for module in pkgutil.iter_modules(package.__path__):
        named = _STEP_MODULE.fullmatch(module.name)
        if named is None:
            continue
        step = importlib.import_module(f"{package.__name__}.{module.name}").STEP
        if not isinstance(step, Step) or (step.from_format, step.to_format) != (int(named[1]), int(named[2])):
            raise ValueError(f"{package.__name__}.{module.name} holds another step than its name says")
        found.append(step)
    return tuple(sorted(found, key=lambda step: step.from_format))
