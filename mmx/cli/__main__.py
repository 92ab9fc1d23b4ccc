"""`python -m mmx.cli` runs the same program as `mmx`."""
from mmx.cli import main

raise SystemExit(main())
