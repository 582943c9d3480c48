"""Attention: of several tokens at once, and of neighbourhoods."""
