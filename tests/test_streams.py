"""Reading shards: equal batches everywhere, nothing twice, exact resuming, damage noticed."""

import json
import os
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_files import add_member, npy, stored, token_index, write_shards

from elt_lightning.data.shards import ShardIndex
from elt_lightning.data.streams import HeldOutStream, ShardLoader, TrainingStream
from elt_lightning.errors import UserError

COUNTS = [7, 20, 3, 13, 0, 17]  # 60 pictures, in shards smaller and larger than a stretch


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), token_index(COUNTS))


def stream(location: str, **settings: Any) -> TrainingStream:
    defaults = {"batch_size": 4, "global_batch_size": 8, "shuffle_block": 6, "seed": 3}
    return TrainingStream(location, ShardIndex.read(location), **(defaults | settings))


def in_turn(stream: TrainingStream) -> list[list[int]]:
    """The batches of one rank as a loader gives them: its readers take turns."""
    readers = [stream.batches(reader) for reader in range(stream.readers)]
    batches: list[list[int]] = []
    while len(batches) < len(stream):
        batch = next(readers[len(batches) % len(readers)], None)
        if batch is None:
            break
        assert torch.equal(batch.x, batch.indices[:, None].expand(-1, 4).to(torch.int16))
        assert torch.equal(batch.labels, batch.indices % 3)
        batches.append(batch.indices.tolist())
    assert all(next(reader, None) is None for reader in readers)
    return batches


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("shuffle_block", [1, 6, 1000])
def test_every_rank_gets_equal_batches_and_no_picture_comes_twice(
    location: str, world_size: int, num_workers: int, shuffle_block: int
) -> None:
    settings = {"num_workers": num_workers, "world_size": world_size, "shuffle_block": shuffle_block}
    ranks = [in_turn(stream(location, rank=rank, **settings)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {60 // 8 * 8 // (4 * world_size)}
    shown = Counter(number for batches in ranks for batch in batches for number in batch)
    assert all(len(batch) == 4 for batches in ranks for batch in batches)
    assert len(shown) == 56
    assert set(shown.values()) == {1}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("steps", [1, 3, 6, 7, 9])
def test_a_resumed_run_goes_on_with_the_batch_that_was_next(
    location: str, world_size: int, num_workers: int, steps: int
) -> None:
    for rank in range(world_size):
        settings = {"num_workers": num_workers, "world_size": world_size, "rank": rank}
        epoch = steps // 7
        whole = in_turn(stream(location, first_step=7 * epoch, **settings))
        rest = in_turn(stream(location, first_step=steps, **settings))
        assert rest == whole[(steps - 7 * epoch) * (2 // world_size) :]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_with_processes_gives_the_same_batches_and_follows_the_step(location: str, num_workers: int) -> None:
    step = 5
    loader = ShardLoader(stream(location, num_workers=num_workers), lambda: step)
    assert len(loader) == 14
    assert [batch.indices.tolist() for batch in loader] == in_turn(
        stream(location, num_workers=num_workers, first_step=5)
    )
    step = 7
    assert [batch.indices.tolist() for batch in loader] == in_turn(
        stream(location, num_workers=num_workers, first_step=7)
    )


def test_epochs_differ_seeds_differ_and_all_is_shown_about_equally_often(location: str) -> None:
    epochs = [list(chain(*in_turn(stream(location, first_step=7 * epoch)))) for epoch in range(30)]
    assert len({tuple(epoch) for epoch in epochs}) == 30
    assert in_turn(stream(location, seed=4)) != in_turn(stream(location, seed=3))
    shown = Counter(number for epoch in epochs for number in epoch)
    assert len(shown) == 60
    assert min(shown.values()) >= 15


def test_neighbours_in_a_shard_are_mixed(location: str) -> None:
    order = list(chain(*in_turn(stream(location, shuffle_block=60))))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert neighbours < 10


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_val_pictures_come_once_over_all_ranks(location: str, world_size: int, num_workers: int) -> None:
    shown: list[int] = []
    for rank in range(world_size):
        val = HeldOutStream(location, ShardIndex.read(location), 8, num_workers, rank, world_size)
        batches = [batch for reader in range(val.readers) for batch in val.batches(reader)]
        assert len(batches) == len(val)
        shown += [number for batch in batches for number in batch.indices.tolist()]
    assert sorted(shown) == list(range(60))


def test_a_mirrored_copy_is_chosen_half_of_the_time_by_picture_and_epoch_alone(tmp_path: Path) -> None:
    where = write_shards(tmp_path, token_index([50, 50], copies=2))

    def mirrored(epoch: int, **settings: Any) -> dict[int, bool]:
        chosen = {}
        steps = 100 // settings.get("global_batch_size", 8)
        for batch in islice(stream(where, first_step=epoch * steps, **settings).batches(0), 1000):
            chosen |= dict(zip(batch.indices.tolist(), (batch.x[:, 0] >= 100).tolist(), strict=True))
            assert torch.equal(batch.x[:, 0] % 100, batch.indices.short() % 100)
        return chosen

    first, again = mirrored(0), mirrored(0, batch_size=10, global_batch_size=20)
    assert all(first[number] == again[number] for number in first)
    assert 30 < sum(again.values()) < 70
    second = mirrored(1, batch_size=10, global_batch_size=20)
    assert 20 < sum(again[number] != second[number] for number in again) < 80


def read_all(where: str) -> list[int]:
    return list(chain(*in_turn(stream(where, batch_size=1, global_batch_size=1))))


def damaged(tmp_path: Path) -> tuple[str, Path]:
    where = write_shards(tmp_path, token_index([20, 20]))
    return where, tmp_path / "00001.tar"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.93])
def test_a_damaged_shard_is_named_and_costs_no_sample_in_silence(
    tmp_path: Path, place: float, num_workers: int
) -> None:
    where, shard = damaged(tmp_path)
    content = bytearray(shard.read_bytes())
    header = int(place * 20) * (2 * 512 + 1024)  # of a member; a sample takes two headers and two blocks
    content[header : header + 512] = b"\xff" * 512
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"00001.tar .*elt encode") as caught:
        list(ShardLoader(stream(where, batch_size=1, global_batch_size=1, num_workers=num_workers)))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 512, 5000, 12288])
def test_a_truncated_shard_is_named(tmp_path: Path, size: int) -> None:
    where, shard = damaged(tmp_path)
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(UserError, match=r"00001.tar .*elt encode"):
        read_all(where)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    where, shard = damaged(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001.tar .*elt encode"):
        read_all(where)


def rewrite(shard: Path, order: list[int]) -> None:
    """Write the samples of a shard again, those of these places."""
    with tarfile.open(shard) as tar:
        members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for place in order:
            for name, content in members[2 * place : 2 * place + 2]:
                add_member(tar, name, content)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "wrong", ["a copy of another", "of another set", "one twice", "in another order", "one more", "a bit in the codes"]
)
def test_a_shard_of_other_samples_is_refused_though_their_number_is_right(
    tmp_path: Path, wrong: str, num_workers: int
) -> None:
    """Training would go on with it, some samples twice and others never."""
    where, shard = damaged(tmp_path)
    order = list(range(20))
    if wrong == "a copy of another":
        shard.write_bytes((tmp_path / "00000.tar").read_bytes())
    elif wrong == "of another set":  # whose samples have the same numbers
        other = replace(token_index([20, 20]), classes=("a", "b"))
        shard.write_bytes((Path(write_shards(tmp_path / "other", other)) / "00001.tar").read_bytes())
    elif wrong == "one twice":
        rewrite(shard, [3, 1, 2, *order[3:]])
    elif wrong == "in another order":
        rewrite(shard, order[::-1])
    elif wrong == "one more":
        rewrite(shard, [*order, 0])
    else:
        content = shard.read_bytes()
        place = content.index(npy(stored(25, token_index([1]))))
        shard.write_bytes(content[: place + 130] + b"\x01" + content[place + 131 :])
    with pytest.raises(UserError, match=r"00001\.tar cannot be read near sample 20 .*other samples than were encoded"):
        list(ShardLoader(stream(where, batch_size=1, global_batch_size=1, num_workers=num_workers)))


def test_shards_of_earlier_versions_are_read_as_ever(tmp_path: Path) -> None:
    where = write_shards(tmp_path, token_index([20, 20]))
    index = json.loads((tmp_path / "index.json").read_text())
    for shard in index["shards"]:
        del shard["crc32"]
    index["num_codes"] = index.pop("codebook_size")
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert sorted(read_all(where)) == list(range(40))


def test_a_shard_or_an_index_that_is_no_file_is_refused(tmp_path: Path) -> None:
    where, shard = damaged(tmp_path)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"00001\.tar cannot be read near sample 0 \(OSError it is a FIFO"):
        read_all(where)
    (tmp_path / "index.json").unlink()
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(UserError, match=r"index\.json cannot be read .*it is a FIFO"):
        ShardIndex.read(where)


def replace_member(shard: Path, suffix: str, content: bytes | None) -> None:
    """Write one-sample shards again with another member, or without it."""
    with tarfile.open(shard) as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    with tarfile.open(shard, "w") as tar:
        for name, old in members.items():
            if not name.endswith(suffix):
                add_member(tar, name, old)
            elif content is not None:
                add_member(tar, name, content)


WRONG_MEMBERS = {
    "no codes": ("npy", None, "codes.npy"),
    "no label": ("json", None, "json"),
    "codes of another shape": ("npy", npy(np.zeros((1, 5), np.int16)), "shape"),
    "codes cut short": ("npy", npy(np.zeros((1, 4), np.int16))[:-3], ""),
    "codes that are pickled": ("npy", npy(np.array([[{"run": "code"}] * 4], dtype=object)), "allow_pickle"),
    "codes that are text": ("npy", b"tokens", ""),
    "a label out of range": ("json", json.dumps({"label": 3, "source": "x"}).encode(), "label 3"),
    "a label below zero": ("json", json.dumps({"label": -1, "source": "x"}).encode(), "label -1"),
    "a label that is text": ("json", json.dumps({"label": "cat", "source": "x"}).encode(), "cat"),
    "no JSON": ("json", b"{", ""),
    "JSON without a label": ("json", b"{}", "label"),
    "JSON that is a list": ("json", b"[3]", ""),
}


@pytest.mark.parametrize("what", WRONG_MEMBERS)
def test_wrong_members_are_named(tmp_path: Path, what: str) -> None:
    suffix, content, message = WRONG_MEMBERS[what]
    where = write_shards(tmp_path, token_index([1]))
    replace_member(tmp_path / "00000.tar", suffix, content)
    with pytest.raises(UserError, match=rf"(?s)00000.tar cannot be read near sample 1 .*{message}"):
        read_all(where)


def test_codes_outside_the_codebook_are_named(tmp_path: Path) -> None:
    index = token_index([1])
    where = write_shards(tmp_path, index)
    replace_member(tmp_path / "00000.tar", "npy", npy(stored(0, index) + 300))
    index.write(tmp_path)  # without its checksum, which would tell first
    with pytest.raises(UserError, match="codes from 300 to 300"):
        read_all(where)


WRONG_INDICES = {
    "missing": None,
    "no JSON": "{",
    "a list": "[]",
    "something else": "{}",
    "newer": json.dumps({"version": 99}),
}


@pytest.mark.parametrize("what", WRONG_INDICES)
def test_a_wrong_index_is_named(tmp_path: Path, what: str) -> None:
    content = WRONG_INDICES[what]
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        ShardIndex.read(str(tmp_path))


def test_a_shard_that_is_named_twice_or_a_sum_that_is_wrong_is_refused(tmp_path: Path) -> None:
    index = token_index([20, 20])
    replace(index, shards=index.shards[:1] * 2).write(tmp_path)
    with pytest.raises(UserError, match=r"names the shard 00000\.tar more than once"):
        ShardIndex.read(str(tmp_path))
    index.write(tmp_path)
    (tmp_path / "index.json").write_text((tmp_path / "index.json").read_text().replace("40", "41"))
    with pytest.raises(UserError, match="says 41 samples, and its shards have 40"):
        ShardIndex.read(str(tmp_path))


def test_shard_names_cannot_lead_elsewhere(tmp_path: Path) -> None:
    index = token_index([1])
    write_shards(tmp_path, index)
    replace(index, shards=(replace(index.shards[0], name="../00000.tar"),)).write(tmp_path)
    with pytest.raises(UserError, match="slash"):
        ShardIndex.read(str(tmp_path))


def test_an_index_survives_writing_and_reading(tmp_path: Path) -> None:
    index = replace(token_index(COUNTS, copies=2), unreadable=("a/b.JPEG",), latent_scale=0.5)
    index.write(tmp_path)
    assert ShardIndex.read(str(tmp_path)) == index
