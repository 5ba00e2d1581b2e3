"""The command line. `program.py` is its beginning, and has the commands with their help."""
