"""The report of a run: one HTML page and one Markdown file, from the run folder alone."""
