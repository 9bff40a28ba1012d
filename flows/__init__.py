"""When, and in what order: recipes, flows and the command-line program."""
