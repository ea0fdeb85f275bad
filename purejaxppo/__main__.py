"""`python -m purejaxppo` is the command `purejaxppo`."""

from purejaxppo.cli.main import script

script()
