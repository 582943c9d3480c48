"""Whole models, side by side: `python -m benchmarks --mode e2e` and `--mode curves`.

shapes.py      the models
providers.py   who may change them, by name
worker.py      one process: a task in, facts out
trainee.py     the model, its adapters, its optimizer, and one training step
profile.py     where the time of a step goes
parts.py       what a kernel is for, by its name
lengths.py     the longest sequence that fits
curves.py      losses on real text
processes.py   starts workers, waits for them, and ends those that hang
report.py      rows, verdicts, tables
breakdown.py   the same of the parts of a step
readme.py      tables between the markers of a page
figures.py     plots of committed results
cli.py         all of it, in order
"""
