"""Offline generation: a file of prompts in, a file of completions out, resumable at any point.

seeds.py      a row's seed from the run's and its index
fields.py     which fields of a record are prompt, id and kept columns, and their types
rows.py       a row that can be generated from, or the error that it is
streams.py    bytes and lines of an input, compressed or not; standard input as a file
tables.py     CSV and Parquet as records
records.py    a JSON record as a row; openai_batch.py: a batch line as rows
readers.py    files as rows, lazily
flat.py       one result as flat rows and canonical bytes; openai_answers.py: as a response line
line_format.py    the lines that an output consists of, and how they are known again
append_file.py    a file that grows by durable pieces
output.py     jsonl and jsonl.zst (zstd_frames.py)
shards.py     Parquet by shards and journal; parquet_output.py, parquet_files.py, card.py
outcomes.py   what became of each request of a job, errors included
packing.py    rows into jobs, as many as their lengths allow
job_names.py  a job's id from its run and its rows
found_jobs.py jobs of an earlier start, and which rows are in them
window.py     requests in flight: bounded, found again, taken in as they end
writer.py     outcomes into files in input order, durable at intervals
resume.py     which rows an earlier run has written
manifest.py   what a run is: its input, parameters, progress and digests
folder.py     the folder beside the output: lock, manifest, errors
opening.py    what a run finds when it begins
dry_run.py    what a run would be
plan.py       what a run is to make, its limits, its progress
run.py        a run from its first row to its manifest
pace.py       how fast a count has grown lately
run_state.py  how a run goes, as Redis keeps it
outputs.py    what a run has written, read back
comparison.py where two completions of one row part
verification.py   rows made again and compared
"""
