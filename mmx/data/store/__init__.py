"""Token stores: a source tokenized once, on disk or in an object store, and read row by row.

`layout` says what files a store has, `preparing` writes them, `reading` reads them, `cache` prepares the sources of a run.
"""
