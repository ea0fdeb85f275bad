"""What metrics say: labelled arrays, statistics, rankings, pictures."""
