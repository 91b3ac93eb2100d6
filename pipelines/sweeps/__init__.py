"""`sdlora sweep`: many chains that differ in a few parameters, and one table of their results."""
