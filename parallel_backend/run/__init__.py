"""`parallel-mmdit run`: a prompt to a picture from the shell."""
