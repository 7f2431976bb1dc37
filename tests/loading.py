"""A Python file as its user imports it: by its path, not watched by the import hook of the tests."""

import hashlib
import importlib.util
import pathlib
import sys
import types


def module_from_file(path: pathlib.Path) -> types.ModuleType:
    """The module that a file makes; every path is a module of its own."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
