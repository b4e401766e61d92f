"""One rank of a backend: what it does for each request, alike on all of them."""
