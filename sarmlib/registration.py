"""Lets transformers' Auto classes load our models after ``import sarmlib`` alone, which stays light.

Nothing is imported until transformers loads its own table of models; then `sarm.model` adds ours to it.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

TABLE, OURS = "transformers.models.auto.modeling_auto", "sarmlib.sarm.model"


class _WhenTableIsLoaded(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(TABLE)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), import_module(OURS))
        return spec


def register() -> None:
    """Add our models to transformers' table, now or when it is loaded."""
    if TABLE in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, _WhenTableIsLoaded())
