"""`python -m vitcls` is the script `vitcls`."""

import sys

from vitcls.cli import main

sys.exit(main())
