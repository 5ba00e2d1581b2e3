"""One run of any command: its options, record, folder, plan, windows and loop over blocks."""
