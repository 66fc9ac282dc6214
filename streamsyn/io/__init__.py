"""Reading and writing files: what the stages have in common, without knowing what a row means.

Reading rows, for seeds, a corpus, evaluation sets and files to train on:

    path, glob, URL, name on the hub -> paths -> places -> row_reader -> rows with their places

    paths          which files and datasets a pattern names, and the format of each
    places         a local path, a file behind a URL, a dataset on the hub
    decompression  the bytes of a file in bounded chunks, decompressed as its content says
    content        what the beginning of a file says: its layout, or why it cannot be read
    rows           a line, a row of a table, their places; the interface of the readers
    text           text in UTF-8, in pieces
    json_rows      rows of JSON: lines, an array, a document
    delimited      rows of CSV and TSV
    tables         rows of Parquet, of saved datasets, of datasets on the hub
    row_reader     picks the reader of a place

A new compression is added in `decompression`; a new format in `paths` (its suffixes) and in `row_reader`.

Keeping things on disk:

    durable        files and folders that survive a loss of power
    spool          what was read from a pipe, on disk before it is acted on
    derived        SQLite files that can be made again when they are damaged
    remote         folders behind URLs, by fsspec
"""
