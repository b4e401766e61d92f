"""What workflows hang on a MODEL and on CONDITIONING: a file per kind recognises it, and refuses by name what can't be honoured."""
