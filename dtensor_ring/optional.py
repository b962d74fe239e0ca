"""Names that need an optional package: they can be imported without it, and say what is missing when they are used.

from dtensor_ring import ring_plan       # without transformers: a stand-in
ring_plan(model)                         # MissingExtraError: ... pip install 'dtensor-ring[transformers]'
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

from typing_extensions import override


class MissingExtraError(ImportError):
    """A part of this package needs another one, which is not installed or too old; the text says how to install it."""

    @classmethod
    def of(cls, extra: str, needed: str, reason: ImportError) -> MissingExtraError:
        """The error of an extra of this package, named as the package that it brings, for why that one was not imported."""
        text = f"needs {needed}, found: {reason}. Install it with pip install 'dtensor-ring[{extra}]'"
        return cls(text, name=reason.name, path=reason.path)


class _StandIn(type):
    """The type of classes that stand for names that could not be imported: annotations and isinstance work, use raises."""

    # A class, since a module that imports the name may use it as a type: `ring_plan: RingPlan | None`.
    reason: MissingExtraError

    @override
    def __call__(cls, *_args: object, **_options: object) -> NoReturn:
        raise cls._error()

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("_"):  # what inspection looks for
            raise AttributeError(name)
        raise cls._error()

    @override
    def __repr__(cls) -> str:
        return f"<{cls.__name__}: {cls.reason}>"

    def _error(cls) -> MissingExtraError:
        return MissingExtraError(f"{cls.__name__} {cls.reason}")


def optional(module: str, name: str) -> object:
    """Imports `name` from `module`; if that needs what is not installed, returns a stand-in that raises when it is used."""
    # Only the error that names a missing extra is held back: any other error of the module is a fault, and must be seen at once.
    try:
        return getattr(import_module(module), name)
    except MissingExtraError as reason:
        return _StandIn(name, (), {"reason": reason, "__module__": module})
