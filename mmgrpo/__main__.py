"""``python -m mmgrpo``."""

import sys

from mmgrpo.cli.main import main

sys.exit(main())
