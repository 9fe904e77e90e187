"""
Import late what makes a program's start slow, and yet never while the program forks.

In:   names of modules, in the thread that is about to use them first.
Out:  the modules, loaded.

Python keeps a lock for every module that is being imported. Forked in the middle of that, a child has the
lock and not the thread that would let go of it, and waits for ever when it imports the same module. So a
fork waits until an import of ours is done: a fraction of a second, once in the life of a process.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading

_importing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )


def load(*names: str) -> None:
    """Import the modules called `names`, if they are not yet."""
    if all(name in sys.modules for name in names):
        # Imported here before, or by the program itself: then it is loaded, or the program's own affair.
        return
    with _importing:
        for name in names:
            importlib.import_module(name)
