"""Losses of logits."""
