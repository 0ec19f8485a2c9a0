"""`shoal bench peers`: the same workload on Shoal and on other engines, in turns.

    protocol.py    what a peer is
    adapters.py    each engine as one
    engines.py     which there are, and how each is installed
    child.py       runs one adapter in a process of its own, in any interpreter
    processes.py   the parent's end: starts children, asks them, sees them fail
    measure.py     turns, checks and the report; table.py shows it

The first four import nothing but the standard library and the engine they run, for their
interpreter may have neither Shoal nor what it needs.
"""
