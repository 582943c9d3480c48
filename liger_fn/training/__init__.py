"""The main job, `python -m liger_fn train`: one model, one text, trained unpatched and patched.

options.py   what can be asked for; imports nothing heavy
text.py      files to documents to tokens to batches
model.py     the model to train and the ways to patch it
loop.py      one training run
report.py    table, plot, CSV and JSON of the runs
run.py       all of it, in order
"""
