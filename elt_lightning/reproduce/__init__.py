"""The paper's experiments, tables and figures, run through the same commands that users run."""

import os

os.environ["MPLBACKEND"] = "agg"  # before matplotlib is imported, which a name of none would end
