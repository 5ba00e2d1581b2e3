"""What the machine offers: memory, sizes, rates of devices and fast tensor products."""
