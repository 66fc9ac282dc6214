"""Reading the rows of a run while they are written, from its directory or from a daemon.

Modules in reading order:
    shard_lines    lines of one shard from a row on, found without reading the shard from its beginning
    run_rows       rows of one kind of a run directory, live or complete: sealed shards, then the open one;
                   waits until files in a folder have changed
    joined_rows    the same of a run with partitions, all of them as one
    daemon_client  asks a daemon for a run and its rows, again when it fails
    follow         `follow` and the iterator that it returns, over batches of rows of a directory or a daemon
"""
