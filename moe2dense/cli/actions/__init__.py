"""What the commands do once their flags are read. These modules load torch, the commands' own do not."""
