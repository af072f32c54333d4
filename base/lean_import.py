"""Importing the compiled core of a package without the Python layer around it."""

from __future__ import annotations

import os
import sys

from base.lean_typing import Any


def package_folder(name: str) -> str | None:
    """Return the folder of a top-level package, None if there is none on the path."""
    for folder in sys.path:
        candidate = f"{folder}/{name}"
        if os.path.isdir(candidate):
            return candidate
    return None


def import_core(name: str) -> Any:
    """Import module ``name`` (dotted) without executing the packages that it lies in. Raises ImportError.

    The packages can be imported later as usual; they find the module loaded.
    """
    packages = name.split(".")[:-1]
    folder = package_folder(packages[0]) if packages else None
    lent = []
    if folder is not None:
        for count in range(1, len(packages) + 1):
            package = ".".join(packages[:count])
            if package not in sys.modules:
                stand_in = type(sys)(package)
                stand_in.__path__ = ["/".join([folder, *packages[1:count]])]
                sys.modules[package] = stand_in
                lent.append(package)
    try:
        __import__(name)
        return sys.modules[name]
    finally:
        for package in lent:
            del sys.modules[package]
