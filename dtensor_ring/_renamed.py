"""Arguments of public functions that have a new name: the old one works as a keyword, with a DeprecationWarning.

@renamed(mesh="device_mesh")
def shard_batch(batch, device_mesh, ...): ...

shard_batch(batch, mesh)                  as ever
shard_batch(batch, mesh=mesh)             DeprecationWarning, then as shard_batch(batch, device_mesh=mesh)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: `old="new"` for each argument that was called `old` and is called `new`.

    Raises (from the function):
        TypeError: both names of an argument are given.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(
                            f"{function.__name__}() got {old}= and {new}=, two names of one argument: pass {new}= alone"
                        )
                    warnings.warn(
                        f"{old}= of {function.__name__} is called {new}= now, as in torch.distributed.tensor; the old name will be "
                        "removed",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate
