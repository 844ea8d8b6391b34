"""Hold every option of a run: its default, its type and its help, and how TOML files and flags fill it. No torch here."""
