"""Imported before all else: what other modules make stays, and looking through it for garbage takes a third of their time."""

from __future__ import annotations

import gc

gc.disable()


def done() -> None:
    """Everything is imported: what there is now is not looked through any more, and what comes is, as always."""
    gc.freeze()
    gc.enable()


def ended() -> None:
    """What was imported is let go of as always, without which libraries speak of leaks."""
    gc.unfreeze()
