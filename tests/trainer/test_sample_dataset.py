"""`SampleDataset` with torch's loaders, torchdata's and datasets."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import streamsyn
from streamsyn import ConfigError, RunReplaced, SampleDataset
from streamsyn.sink.rundir import RunDirectory
from tests.builders import opened, sample, sink
from tests.following.run_server import RunServer, in_thread

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


def add(root: Path, count: int, *, finish: bool = False) -> None:
    """Have a run write samples, and end."""
    directory = RunDirectory(root)
    directory.save({}, {})
    directory.close()
    with opened(root, sink()) as log:
        first = log.samples.rows
        log.samples.append([sample(at) for at in range(first, first + count)])
        if finish:
            log.finish()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 50 samples."""
    root = tmp_path_factory.mktemp("run")
    add(root, 50, finish=True)
    return root


def seqs(batches: Any) -> list[int]:
    return [row["seq"] for batch in batches for row in batch]


def test_columns_are_what_trainers_expect(run: Path) -> None:
    """By default the answer stands apart, so that it alone is trained on."""
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}

    assert {"prompt": [user], "completion": [assistant], "seq": 0} == next(iter(SampleDataset(run)))
    assert {"messages": [user, assistant], "seq": 4} == next(iter(SampleDataset(run, 3, columns="messages")))
    assert {"prompt": "?", "completion": "!", "seq": 0} == next(iter(SampleDataset(run, columns="text")))
    assert "seed-0" == next(iter(SampleDataset(run, columns="all")))["seed_id"]
    with pytest.raises(ConfigError, match="columns='answer': expected prompt_completion, messages"):
        SampleDataset(run, columns="answer")  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_where_it_was(workers: int, run: Path) -> None:
    """torchdata's loader, stopped after any batch and made anew: every row once, as undisturbed."""

    def loader() -> Any:
        return StatefulDataLoader(SampleDataset(run), batch_size=4, num_workers=workers, collate_fn=list)

    whole = list(loader())
    taken: list[Any] = []
    state = None
    while len(taken) < len(whole):
        again = loader()
        if state is not None:
            again.load_state_dict(state)
        batches = iter(again)
        some = list(islice(batches, 5))
        taken += some
        state = again.state_dict()
        del batches, again

    assert list(range(50)) == sorted(seqs(whole))
    assert whole == taken


def test_a_loader_follows_a_live_run_over_restarts(tmp_path: Path) -> None:
    """The rows that come after a restart follow those before it."""
    add(tmp_path, 9)
    loader: Any = StatefulDataLoader(SampleDataset(tmp_path), batch_size=2, collate_fn=list)
    first = list(islice(loader, 4))
    state = loader.state_dict()
    add(tmp_path, 4, finish=True)
    loader = StatefulDataLoader(SampleDataset(tmp_path), batch_size=2, collate_fn=list)
    loader.load_state_dict(state)

    assert list(range(13)) == seqs([*first, *loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_rows(workers: int, run: Path) -> None:
    """None is left out, none comes twice, and each share is the same each time."""
    shares = [
        seqs(DataLoader(SampleDataset(run, rank=rank, world_size=3), 4, num_workers=workers, collate_fn=list))
        for rank in range(3)
    ]

    assert list(range(50)) == sorted(seq for share in shares for seq in share)
    assert {0, 3, 6} & set(shares[0]) or workers
    assert all(shares)


def test_the_position_of_a_share_is_that_of_no_other(run: Path) -> None:
    """Different numbers of ranks or workers are refused; a position of all rows suits any share."""
    dataset = SampleDataset(run, rank=1, world_size=2)
    rows = [row["seq"] for row in islice(dataset, 3)]
    state = dataset.state_dict()
    dataset.load_state_dict(state)
    rows += [row["seq"] for row in islice(dataset, 2)]
    alone = SampleDataset(run)
    list(islice(alone, 4))
    dataset.load_state_dict(alone.state_dict())

    assert [1, 3, 5, 7, 9] == rows
    assert [5, 7] == [row["seq"] for row in islice(dataset, 2)]
    for rank, world_size in ((0, 2), (1, 3), (0, 1)):
        other = SampleDataset(run, rank=rank, world_size=world_size)
        with pytest.raises(ConfigError, match="is that of share 2 of 2 of the samples, but this is share"):
            other.load_state_dict(state)
    with pytest.raises(ConfigError, match="rank=2: expected 0 to 1"):
        SampleDataset(run, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="world_size=0: expected at least 1"):
        SampleDataset(run, world_size=0)
    with pytest.raises(ConfigError, match=r"lacks run, shard, shards: pass what state_dict\(\) returned"):
        other.load_state_dict({"seq": 3})


def test_each_iteration_begins_anew_unless_a_position_was_loaded(run: Path) -> None:
    """To look at the first row, as trainers do, moves nothing."""
    dataset = SampleDataset(run, after=9)
    first = [next(iter(dataset))["seq"] for _ in range(3)]
    dataset.load_state_dict(dataset.position(40))

    assert [10, 10, 10] == first
    assert list(range(41, 50)) == [row["seq"] for row in dataset]
    assert 49 == dataset.state_dict()["seq"]
    assert list(range(10, 50)) == [row["seq"] for row in dataset]


def test_the_position_in_a_different_run_is_refused(run: Path, tmp_path: Path) -> None:
    """Also if it has rows with these numbers."""
    add(tmp_path, 20, finish=True)
    before = SampleDataset(run)
    list(islice(before, 5))
    other = SampleDataset(tmp_path)
    other.load_state_dict(before.state_dict())

    with pytest.raises(RunReplaced, match="now holds a different run"):
        next(iter(other))


@pytest.fixture
def server() -> Iterator[RunServer]:
    """A daemon's stand-in with a finished run of 20 samples."""
    with in_thread(RunServer()) as serving:
        serving.write(20, state="finished")
        yield serving


def test_a_run_at_a_daemon_is_read_too(server: RunServer) -> None:
    """With the same position."""
    dataset = SampleDataset(server.url)
    first = [row["seq"] for row in islice(dataset, 5)]
    state = dataset.state_dict()
    again = SampleDataset(server.url)
    again.load_state_dict(state)

    assert list(range(20)) == first + [row["seq"] for row in again]


def test_datasets_has_a_view_of_it(run: Path) -> None:
    """It can be mapped, and keeps a position of its own."""
    view = SampleDataset(run).as_hf().map(lambda row: {"answer": row["completion"][0]["content"]})
    first = list(islice(view, 3))

    assert ["!", "!", "!"] == [row["answer"] for row in first]
    assert list(range(50)) == [row["seq"] for row in view]


def test_torch_is_imported_only_when_it_is_used() -> None:
    """`import streamsyn` costs nothing, and `dir` shows what there is."""
    code = "import streamsyn, sys; streamsyn.follow; print('torch' in sys.modules, dir(streamsyn))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.startswith("False")
    assert "SampleDataset" in done.stdout
    assert streamsyn.SampleDataset is SampleDataset
