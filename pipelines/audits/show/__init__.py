"""`sdlora audit show`: one class, one image or one task through all steps."""
