"""How a plan gets to where it runs. Imports no torch; the only place that knows schedulers."""
