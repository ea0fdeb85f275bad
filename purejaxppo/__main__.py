import sys

from purejaxppo.experiment.command_line import main

sys.exit(main())
