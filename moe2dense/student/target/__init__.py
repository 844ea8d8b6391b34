"""Resolve what `--to` asks for into a dense architecture and its sizes."""
