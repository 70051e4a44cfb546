"""What a study writes for readers: tables, figures, pages, and PEFT's layout of results."""
