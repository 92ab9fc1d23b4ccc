"""`python -m mmx.cli` is `mmx`."""
import sys

from mmx.cli import main

sys.exit(main())
