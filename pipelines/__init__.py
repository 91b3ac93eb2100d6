"""The application in rooms: each imports only from rooms below it, from `cli` at the top down to `project`."""
