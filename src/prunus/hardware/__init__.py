"""What the hardware offers: memory, memory sizes, speeds of devices, and fast tensor operations."""
