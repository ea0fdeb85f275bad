"""Reports on metrics: labelled arrays, statistics, rankings, plots, pages."""
