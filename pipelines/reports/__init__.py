"""What the report is made of: the history that it reads, figures, pages and templates."""
