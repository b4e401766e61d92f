"""The first ten minutes on one GPU: see README.md beside this file."""
