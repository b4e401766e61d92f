"""One file a section: each has `run(report, options)`, which tells its lines as they come."""

from parallel_backend.rank import lean_imports  # noqa: F401 - as the ranks do, before anything that imports diffusers
