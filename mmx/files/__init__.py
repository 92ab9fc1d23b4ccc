"""Files that are written whole, checked, locked, and read within limits."""
