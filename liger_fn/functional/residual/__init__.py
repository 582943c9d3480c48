"""Residual connections that are learned."""
