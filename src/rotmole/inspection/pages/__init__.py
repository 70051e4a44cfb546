"""What shows an inspection: tables, figures, one HTML page, and a summary for the terminal."""
