"""`python -m flows.cli`, which is what systemd units start."""

import sys

from flows.cli.app import main

sys.exit(main())
