"""Reading and writing files: what the stages have in common, without knowing what a row means.

Reading rows, for seeds, a corpus, evaluation sets and files to train on:

    path, glob, URL, name on the hub -> inputs -> rows with their places

    inputs         which files and datasets a path names, the format of each, and its reader
    places         a local path, a file or folder behind a URL, a dataset on the hub
    content        what the beginning of a file says, or why it cannot be read; its bytes and its text
    rows           a line, a row of a table, their places; the interface of the readers
    json_rows      rows of JSON: lines, an array, a document; any values as JSON can hold them
    tables         rows of CSV, TSV and Parquet, of saved datasets, of datasets on the hub

A new compression is added in `content`, a new format in `inputs`.

Keeping things on disk:

    durable        files and folders that survive a loss of power
    spool          what was read from a pipe, on disk before it is acted on
    derived        SQLite files that can be made again when they are damaged
    process_files  the limit of open files, and the folder for temporary ones
"""
