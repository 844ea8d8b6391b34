"""Know the families of teachers and of dense hosts, as cards; resolve a name, hub id or folder to one. No torch here."""
