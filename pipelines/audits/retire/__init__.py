"""`sdlora retire`: delete the images of a task whose step is done, everywhere, and leave a receipt in the ledger."""
