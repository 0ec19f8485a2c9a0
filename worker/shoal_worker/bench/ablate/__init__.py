"""`shoal bench ablate`: what each optimisation does on this machine, on against off.

    arms.py        a way to run the workload, as a value: pure
    switch.py, switches.py    every optimisation as two arms, with what write-ups claim of it: pure
    rungs.py       from the naive loop to the default, one at a time: pure
    ratios.py      medians, bootstrap intervals and verdicts: pure
    load.py        what every arm runs
    answers.py     what a trial says
    ledger.py      what was measured, as JSON
    old_ways.py    what the engine no longer does: outputs kept, eager attention, old loading
    slower_top_k.py, recompute.py, schedules.py, python_bpe.py    more of them
    trial.py, tokenising.py   one arm at work in this process; launches.py counts what it does
    processes.py   each arm in a process of its own, where child.py answers
    neighbours.py  whether other processes disturbed a run
    rounds.py      processes in turn; measure.py makes rows of it, claims.py sets claims beside
    table.py, markdown.py, picture.py    the ledger, shown
    command.py     the command

Nothing in the engine knows of this: an arm that exists only to be compared replaces a public part
of it in its own process.
"""
