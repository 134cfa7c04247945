"""The whole chain of a recipe: quantise, evaluate, profile, report, compare."""
