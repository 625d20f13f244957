"""The ``casbackup`` command line: parses what was asked, calls the library, shows the outcome."""

import gc
import os

# Before everything else is imported: starting makes tens of thousands of objects, none of them garbage, and jobs
# make no cycles to speak of. With the default of 700, looking for cycles takes a tenth of a short command's time.
gc.set_threshold(50_000, 20, 50)

# numpy brings a library for linear algebra, which nothing here uses, and which would start threads when imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
