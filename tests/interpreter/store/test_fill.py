"""Filling the cache: interrupted, shared among processes, and on disks without room."""

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from interpreter.interrupts import Interrupted, StopRequest
from interpreter.store.fill import Cache, Shard

from .small_caches import LENGTHS, Patches, files, make_cache, store


@pytest.mark.parametrize("seen", [7, 70], ids=["at the start of the second video", "inside of it"])
def test_interrupted_encoding_resumes_with_the_same_bytes(seen, videos, tmp_path):
    store(tmp_path / "whole", videos, Patches())
    backbone = Patches()
    backbone.fail_at = seen
    with pytest.raises(RuntimeError, match="power cut"):
        store(tmp_path / "store", videos, backbone)
    assert len(files(tmp_path / "store")) == 2  # the file of the first video, and no partial file
    assert not list((tmp_path / "store").glob("*/.*"))
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])  # the first video is not encoded again
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 0


def test_interruption_keeps_the_finished_videos(videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches())
    make = cache.maker.make

    def interrupted(video, content, flips, check):
        if video is videos[1]:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:  # a long video: only `check` ends it
                check()
        make(video, content, flips, check)

    cache.maker.make = interrupted
    with StopRequest(at_once=True), pytest.raises(Interrupted):
        cache.fill(Shard(), 1, "")
    assert len(files(tmp_path / "store")) == 2
    assert not list((tmp_path / "store").glob("*/.*"))
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])


def test_two_processes_that_fill_one_cache_share_the_work(videos, tmp_path):
    store(tmp_path / "one", videos, Patches())
    slow, quick = (make_cache(tmp_path / "two", videos, Patches()) for _ in range(2))
    started, others_are_made = threading.Event(), threading.Event()
    make = {cache: cache.maker.make for cache in (slow, quick)}

    def wait_for_the_others(*arguments):
        started.set()
        assert others_are_made.wait(60)
        make[slow](*arguments)

    def make_the_others(video, *arguments):
        make[quick](video, *arguments)
        if video is videos[2]:
            others_are_made.set()

    slow.maker.make, quick.maker.make = wait_for_the_others, make_the_others
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(slow.fill, Shard(), 1, "")
        assert started.wait(60)
        quick.fill(Shard(), 1, "")  # returns when all files exist
        assert files(tmp_path / "two") == files(tmp_path / "one")
        filled.result()
    assert slow.maker.backbone.seen == 2 * LENGTHS[0]
    assert quick.maker.backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])


def test_leftovers_of_killed_processes_alone_are_removed(videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches(), flip=False)
    paths = [cache.maker.stores[False].path(content.digest) for content in cache.contents]
    paths[0].parent.mkdir(parents=True)
    for path in paths[:2]:
        path.with_name(f".{path.name}.abcd.tmp").write_bytes(b"half")
    paths[2].with_name(f".{paths[2].stem}.lock").touch()
    alive = cache._lock(1)
    assert alive.take()
    cache._remove_leftovers()
    assert sorted(path.name for path in paths[0].parent.glob(".*")) == sorted(
        [alive.path.name, f".{paths[1].name}.abcd.tmp"]
    )
    alive.release()
    cache.fill(Shard(), 1, "")
    assert not list(paths[0].parent.glob(".*"))


def test_ranks_make_together_what_one_makes(videos, tmp_path):
    store(tmp_path / "one", videos, Patches())
    seen = []
    for rank in (1, 0):
        backbone = Patches()
        make_cache(tmp_path / "two", videos, backbone).fill(Shard(rank, 2), 2, "")
        seen.append(backbone.seen)
    assert seen == [2 * LENGTHS[1], 2 * (LENGTHS[0] + LENGTHS[2])]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_rank_waits_until_the_others_are_done(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("interpreter.store.fill.POLL_SECONDS", 0.01)
    mine, others = (make_cache(tmp_path / "store", videos, Patches()) for _ in range(2))
    mine.fill(Shard(0, 2), 1, "")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(others.fill, Shard(1, 2), 1, "")
        mine.wait_for_others()
    assert mine.missing() == {}
    assert len(files(tmp_path / "store")) == 6


def test_disk_without_room_is_found_before_encoding(videos, small_disk):
    disk, backbone = small_disk(16384), Patches()
    (disk / "video").write_bytes(b"kept")
    with pytest.raises(OSError, match=r"the features need .* but .*/features has .* free; ADVICE") as caught:
        store(disk / "features", videos, backbone)
    assert caught.value.errno == errno.ENOSPC
    assert backbone.seen == 0
    assert [path.name for path in disk.iterdir()] == ["video"]
    assert (disk / "video").read_bytes() == b"kept"


def test_disk_that_fills_up_meanwhile_keeps_what_is_done(videos, small_disk, monkeypatch):
    disk = small_disk(24576)
    monkeypatch.setattr(Cache, "free_bytes", lambda self: 1 << 30)
    with pytest.raises(OSError, match="the disk is full"):
        store(disk / "features", videos, Patches())
    assert len(files(disk / "features")) == 2  # both flips of the first video
    assert not list(disk.glob("*/.*.tmp"))


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "")])
def test_senseless_rank_is_refused(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank} and WORLD_SIZE={world}"):
        Shard.from_environment()
