"""`python -m purejaxppo` is the command `purejaxppo`."""

import sys

from purejaxppo.cli.main import main

sys.exit(main())
