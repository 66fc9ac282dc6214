"""How files and splits are called, and what else `datasets` looks for."""

import hashlib
from typing import Any

import orjson

from streamsyn.export.shards import Shards
from streamsyn.export.splits import Split, Splits, TaskNames
from streamsyn.export.target import Target


class Layout:
    """How files and splits are called.

    Args:
        form: The format.
        splits: Says whether each task is a configuration of its own.
    """

    def __init__(self, form: str, splits: Splits) -> None:
        self._is_saved = form == "datasets"
        self._by_task = splits.by_task
        self._is_single = not splits.by_task and len(splits.shares) == 1
        self._shares = len(splits.shares)
        self._names = TaskNames()

    def stem(self, split: Split) -> str:
        """The beginning of the names of a split's files."""
        if self._is_saved:
            return f"{self.saved_name(split)}/data" if not self._is_single else "data"
        folder = f"data/{self._names(split.task)}" if split.task is not None else "data"
        return f"{folder}/{split.name}"

    def saved_name(self, split: Split) -> str:
        """The key of a split in a saved data set: that of its task, where tasks are all that is split by."""
        if split.task is None:
            return split.name
        return self._names(split.task) + (f".{split.name}" if self._shares > 1 else "")

    def saved_splits(self, written: dict[Split, Shards]) -> dict[str, Shards] | None:
        """The splits of a saved data set; None where it is a single one, without a name."""
        if self._is_single:
            return None
        return {self.saved_name(split): shards for split, shards in written.items()}

    def configs(self, written: dict[Split, Shards]) -> list[tuple[str, list[tuple[str, str]]]]:
        """(name, [(split, pattern)]) of each configuration that has rows."""
        if self._is_saved or not written:
            return []
        pattern = "data/*/{}-*" if self._by_task else "data/{}-*"
        names = dict.fromkeys(split.name for split in written)
        configs = [("default", [(name, pattern.format(name)) for name in names])]
        tasks: dict[str, list[tuple[str, str]]] = {}
        for split, shards in written.items():
            if split.task is not None:
                tasks.setdefault(self._names(split.task), []).append((split.name, f"{shards.stem}-*"))
        return configs + sorted(tasks.items())


def save_states(target: Target, layout: Layout, written: dict[Split, Shards]) -> None:
    """What `datasets.load_from_disk` looks for, beside the files of rows."""
    if not written:
        return
    digests = {file["path"]: file["sha256"] for file in target.files}
    named = layout.saved_splits(written)
    for name, shards in (named or {"train": next(iter(written.values()))}).items():
        folder = f"{name}/" if named is not None else ""
        together = "".join(digests[path] for path in shards.names)
        state: dict[str, Any] = {
            "_data_files": [{"filename": path.rpartition("/")[2]} for path in shards.names],
            # What `datasets` makes of these rows is cached by it: it must tell rows from rows.
            "_fingerprint": hashlib.sha256(together.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": name,
        }
        target.put(f"{folder}state.json", orjson.dumps(state, option=orjson.OPT_INDENT_2))
        target.put(f"{folder}dataset_info.json", b"{}")
    if named is not None:
        target.put("dataset_dict.json", orjson.dumps({"splits": list(named)}))
