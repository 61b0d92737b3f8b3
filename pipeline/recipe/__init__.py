"""What is wanted: the recipe, its schema, and how it is read. Imports no torch."""
