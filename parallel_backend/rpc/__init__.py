"""How a client speaks to a backend."""
