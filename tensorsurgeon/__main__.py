"""`python -m tensorsurgeon`."""

import sys

from tensorsurgeon.cli import main

sys.exit(main())
