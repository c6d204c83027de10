"""Run the command line as ``python -m halfmap``."""

import sys

from halfmap.cli import main

sys.exit(main())
