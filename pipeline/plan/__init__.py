"""What will run: every derived number, once. Pure functions; imports no torch."""
