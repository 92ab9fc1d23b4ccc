"""`python -m mmx.cli` runs the same program as `mmx`."""
import sys

from mmx.cli import main

sys.exit(main())
