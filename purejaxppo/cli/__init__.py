"""The commands of the command line, their flags beside them."""
