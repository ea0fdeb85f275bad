"""One run in one folder: the loop that trains it, its checkpoints, and where its metrics go."""
