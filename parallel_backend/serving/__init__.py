"""Rank 0's face to its clients: the socket, whose turn it is, what is told of the backend."""
