"""What workflows hang on a MODEL, as ranks keep and apply it: a file per kind."""
