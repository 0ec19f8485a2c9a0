"""Offline generation: a file of prompts in, a file of completions out, resumable at any point.

seeds.py      a row's seed from the run's and its index
rows.py       one record as a request, or as the error that it is; one result as flat rows
readers.py    files as records, lazily
outcomes.py   what became of each request of a job, errors included
packing.py    rows into jobs, as many as their lengths allow
job_names.py  a job's id from its run and its rows
found_jobs.py jobs of an earlier start, and which rows are in them
window.py     requests in flight: bounded, found again, taken in as they end
writer.py     outcomes into files in input order, durable at intervals
resume.py     which rows an earlier run has written
manifest.py   what a run is: its input, parameters, progress and digests
folder.py     the folder beside the output: lock, manifest, errors
plan.py       what a run is to make, its limits, its progress
run.py        a run from its first row to its manifest
pace.py       how fast a count has grown lately
run_state.py  how a run goes, as Redis keeps it
outputs.py    what a run has written, read back
comparison.py where two completions of one row part
verification.py   rows made again and compared
"""
