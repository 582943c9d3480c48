"""What proves the ops: a spec per op, and properties that follow from it."""
