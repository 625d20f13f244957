"""``python -m casbackup_client``."""

import sys

from casbackup_client.main import main

sys.exit(main())
