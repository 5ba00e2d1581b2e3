"""One run of any verb: its options, record, folder, plan, windows and loop over blocks."""
