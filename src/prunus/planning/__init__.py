"""What a command would do and cost, before it does anything."""
