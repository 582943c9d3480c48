"""Feed-forward blocks whose intermediates are not all held at once."""
