"""What one can say: the sections of a recipe, their names and bounds, and recipes as text. No numpy, no torch."""
