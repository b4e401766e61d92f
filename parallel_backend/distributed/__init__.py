"""Parallel methods: one method, one file."""
