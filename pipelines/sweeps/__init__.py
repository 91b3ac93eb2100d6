"""`sdlora sweep`: chains that differ in a few parameters, side by side, and one table of their results."""
