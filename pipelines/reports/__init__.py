"""What the stage `report` is made of: the history that it reads, and what it makes of it."""
