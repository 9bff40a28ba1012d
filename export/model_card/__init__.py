"""The model card: what a shipped model is, can and cannot do, and how it came about, from the run folder alone."""
