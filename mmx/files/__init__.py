"""Files: atomic writes, checksums, the lock of a workdir, and reading untrusted files within limits."""
