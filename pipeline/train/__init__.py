"""Training: the engine, a step, the loop around it, and the check before it."""
