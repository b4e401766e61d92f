"""One file a section: each has `run(report, options)`, which tells its lines as they come."""
