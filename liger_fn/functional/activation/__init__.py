"""Activations of gated MLPs."""
