"""Export: the log of a run, assembled again, as a data set for training.

The log is read once from start to end: contexts -> assembler -> rows -> splits -> shard files, then the
dataset card. The same request on the same log gives the same bytes, in bounded memory.

In reading order:

- `export_request`: what to export, and the summary of an export.
- `export_run`: the whole export.
- `log_reader`: the run's contexts, assembled with the run's settings or others, as rows of an export.
- `choosing`: the contexts of a log; samples that are chosen in other processes.
- `splits`: the split of a sample; names of files, splits and configurations.
- `formats`: shard files in JSON Lines, Parquet, or the layout of a saved `datasets` directory.
- `target`: the folder at a path or URL; it replaces only files of an earlier export.
- `card`: README.md with the dataset card. It is written last: where it exists, the export is complete.
"""
