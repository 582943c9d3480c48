"""TRL's trainers side by side: `python -m benchmarks --mode trl`.

sizes.py       the model, and how each trainer is given it: on a CPU, and on a GPU for real
providers.py   whose trainers, by name
training.py    one training run: a tokenizer and texts made here, a trainer, times and losses
worker.py      one process: a task in, facts out
report.py      rows, verdicts, tables
cli.py         all of it, in order

Processes, clocks and files are those of `benchmarks.e2e`.
"""
