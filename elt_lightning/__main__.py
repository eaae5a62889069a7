"""`python -m elt_lightning` is `elt`."""

import sys

from elt_lightning.cli import main

sys.exit(main())
