"""Trained agents: load them, play them, draw them, write them as one file, report on them."""
