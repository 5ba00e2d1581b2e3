"""One run of any verb: its options, windows, folder, record and progress."""
