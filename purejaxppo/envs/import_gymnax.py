"""Imports gymnax without matplotlib and seaborn, which only its rendering needs.

They take a second and 120 MB. Until they are used, stand-ins take their place; this file can go when gymnax itself
imports them late.
"""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType


def import_gymnax() -> ModuleType:
    """The package gymnax."""
    with _postponed("matplotlib", "matplotlib.pyplot", "seaborn"):
        return importlib.import_module("gymnax")


@contextlib.contextmanager
def _postponed(*names: str) -> Iterator[None]:
    """Within this context, importing one of these modules gives a stand-in, which imports the module on first use."""
    stand_ins = {name: _StandIn(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _StandIn(ModuleType):
    """Stands for a module, or for an attribute of one, until its package is imported."""

    def __getattr__(self, attribute):
        package = sys.modules.get(self.__name__.partition(".")[0])
        if not isinstance(package, _StandIn) and sys.modules.get(self.__name__) is not self:
            return getattr(pkgutil.resolve_name(self.__name__), attribute)
        if attribute.startswith("__"):
            raise AttributeError(f"{self.__name__} is not imported yet")
        return _StandIn(f"{self.__name__}.{attribute}")
