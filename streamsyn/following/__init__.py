"""Reading the rows of a run while they are written, from its directory.

Modules in reading order:
    shard_lines   lines of one shard from a row on, found without reading the shard from its beginning
    run_rows      rows of one kind of a run directory, live or complete: sealed shards, then the open one
    folder_watch  waits until files in a folder have changed
"""
