"""Files, processes, progress, units, seeds and versions: what every package uses, and nothing that is particular to models."""
