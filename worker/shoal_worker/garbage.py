"""How often Python looks for garbage in a process that serves."""

from __future__ import annotations

import gc

# Of new objects before a look, and of looks before one at older ones. Python's own, 700 and 10,
# took half of the time that the serving loop spends on a token: tokens in flight are lists, all
# looked at again and again, and none of them garbage.
_NEW_OBJECTS = 50_000
_LOOKS = (20, 100)


def settle() -> None:
    """Keep all that is there to the end, and look for garbage among the rest seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *_LOOKS)
