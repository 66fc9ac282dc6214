"""Reading and writing files: what the stages have in common, without knowing what a row means.

Reading rows, for seeds, a corpus, evaluation sets and files to train on:

    path, directory or glob -> paths -> decompression -> lines -> row_reader -> rows with their places

    paths          which files a pattern names, and the format of each
    decompression  the bytes of a file in bounded chunks: plain, .gz, .zst
    lines          lines with their numbers, in bounded memory
    row_reader     rows of JSON lines, Parquet and saved datasets; JSON documents; plain text

A new compression is added in `decompression`; a new format in `paths` (its suffixes) and in `row_reader`.

Keeping things on disk:

    durable        files and folders that survive a loss of power
    spool          what was read from a pipe, on disk before it is acted on
    derived        SQLite files that can be made again when they are damaged
    remote         folders behind URLs, by fsspec
"""
