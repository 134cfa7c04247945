"""Reading run folders: tables, plots, one page, compare and gate. Never loads torch."""
