"""Losses of a linear head, whose logits are never held whole."""
