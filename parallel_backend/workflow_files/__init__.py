"""Workflow files as people share them: read, made parallel, and what in them a parallel MODEL can't honour."""
