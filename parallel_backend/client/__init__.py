"""How a client finds or starts a backend, and what it can ask of one."""
