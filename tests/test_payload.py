from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk.errors import ConfigurationError, InvalidStageEventError
from evalvault_sdk.events import StagePayloadRef
from evalvault_sdk.payload import FolderPayloadStore, PayloadStore
from tests.support import clean_environment

PAYLOAD = '{"문서": "보험"}'.encode()
HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> FolderPayloadStore:
    return FolderPayloadStore(tmp_path / "state" / "payloads")


@pytest.fixture(params=[0o000, 0o022, 0o277])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def files(store: FolderPayloadStore) -> list[Path]:
    return [path for path in store.folder.rglob("*") if not path.is_dir()]


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_what_was_put_is_got_by_its_reference_or_by_the_json_of_it(store: FolderPayloadStore) -> None:
    as_any_store: PayloadStore = store
    ref = as_any_store.put(PAYLOAD)
    assert (ref.store, ref.type) == ("folder", "json")
    assert store.get(ref) == store.get(ref.to_dict()) == PAYLOAD
    assert store.get({"store": "folder", "id": ref.id}) == PAYLOAD


def test_a_reference_tells_the_store_and_the_format(tmp_path: Path) -> None:
    ref = FolderPayloadStore(str(tmp_path / "p"), name="answers").put(b"\x00\xff\r\n", type="parquet")
    assert (ref.store, ref.type) == ("answers", "parquet")
    assert FolderPayloadStore(tmp_path / "p", name="answers").get(ref) == b"\x00\xff\r\n"


def test_an_empty_payload_is_a_payload(store: FolderPayloadStore) -> None:
    assert store.get(store.put(b"")) == b""


def test_the_same_payload_twice_is_kept_twice_under_ids_that_cannot_be_guessed(store: FolderPayloadStore) -> None:
    first, second = store.put(PAYLOAD), store.put(PAYLOAD)
    assert len(files(store)) == 2
    assert len(set(first.id) | set(second.id)) > 8
    assert sum(one != other for one, other in zip(first.id, second.id, strict=True)) > 12, "no counter, no clock"


def test_the_folder_and_what_is_in_it_is_private_whatever_the_umask(store: FolderPayloadStore, umask: int) -> None:
    store.folder.parent.mkdir()
    store.folder.parent.chmod(0o700)
    store.put(PAYLOAD)
    (path,) = files(store)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (store.folder, path.parent, path)] == [0o700, 0o700, 0o600]


def test_an_unfinished_file_is_private_too(store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    chmod = Path.chmod

    def seen_before(path: Path, mode: int, **options: Any) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        chmod(path, mode, **options)

    before = os.umask(0)
    try:
        monkeypatch.setattr(Path, "chmod", seen_before)
        store.put(PAYLOAD)
    finally:
        os.umask(before)
    assert modes == [0o700, 0o700, 0o600]


def test_a_folder_that_others_may_look_into_is_made_private(store: FolderPayloadStore) -> None:
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o755)
    store.put(PAYLOAD)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_refused(store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o777)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        store.put(PAYLOAD)
    assert files(store) == []
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o777


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_link_to_a_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(NotADirectoryError, match="link"):
        FolderPayloadStore(tmp_path / "link").put(PAYLOAD)
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_payloads_are_spread_over_256_folders(store: FolderPayloadStore) -> None:
    refs = [store.put(b"") for _ in range(200)]
    assert {path.name for path in files(store)} == {ref.id for ref in refs}
    folders = {path.parent.name for path in files(store)}
    assert len(folders) > 50
    assert all(re.fullmatch("[0-9a-f]{2}", folder) for folder in folders)


@pytest.mark.parametrize(
    "identity",
    [
        "../secret",
        "../../secret",
        "a/../../secret",
        "{folder}/../secret",
        "secret\x00",
        "a\x00b",
        ".",
        "..",
        "x",
        "A" * 32,
        "0" * 31,
        "0" * 33,
        "0" * 32 + "\n",
        "0" * 32 + ".part",
        "../" + "0" * 29,
        "０" * 32,
    ],
)
def test_an_id_that_was_never_given_reads_nothing(
    store: FolderPayloadStore, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(PAYLOAD)
    for folder in (store.folder, store.folder.parent):
        (folder / "secret").write_bytes(b"secret")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"read {path}"))
    # Made by hand: a reference strips its id.
    ref = StagePayloadRef.__new__(StagePayloadRef)
    for field, value in (("store", "folder"), ("id", identity.format(folder=store.folder)), ("type", "json")):
        object.__setattr__(ref, field, value)
    with pytest.raises(LookupError, match="is no id of a payload"):
        store.get(ref)


@pytest.mark.parametrize("ref", [{"store": "folder", "id": ""}, {"store": "folder"}, {"store": "folder", "id": 7}, {}])
def test_what_is_no_reference_is_refused_by_name(store: FolderPayloadStore, ref: Any) -> None:
    with pytest.raises(InvalidStageEventError, match=r"^(id|store) "):
        store.get(ref)


def test_what_is_not_there_is_said_with_where_and_why(store: FolderPayloadStore) -> None:
    ref = StagePayloadRef("folder", "0" * 32)
    with pytest.raises(LookupError, match=r"there is no payload 0{32} in .*payloads: it was purged, or"):
        store.get(ref)
    assert not store.folder.exists(), "reading makes no folder"


def test_a_payload_of_another_store_is_not_looked_for(store: FolderPayloadStore) -> None:
    ref = store.put(PAYLOAD)
    with pytest.raises(LookupError, match="in the store 's3', not in 'folder'"):
        store.get({**ref.to_dict(), "store": "s3"})


def test_a_store_without_a_name_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidStageEventError, match="store"):
        FolderPayloadStore(tmp_path, name=" ")


def test_a_folder_without_a_name_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="folder"):
        FolderPayloadStore("")


def test_a_relative_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = FolderPayloadStore("payloads")
    monkeypatch.chdir("elsewhere")
    store.put(PAYLOAD)
    assert len(list((tmp_path / "payloads").iterdir())) == 1


def test_a_reader_never_sees_half_a_payload(store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        seen.append((path.parent == target.parent, path.read_bytes(), target.exists()))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    ref = store.put(PAYLOAD)
    assert seen == [(True, PAYLOAD, False)]
    assert [path.name for path in files(store)] == [ref.id]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_raises_and_leaves_nothing_behind(
    store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        assert len(files(store)) == 1
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(type(error)):
        store.put(PAYLOAD)
    assert files(store) == []


def test_a_payload_that_is_no_bytes_is_refused_and_leaves_nothing_behind(store: FolderPayloadStore) -> None:
    with pytest.raises(TypeError):
        store.put("text")  # type: ignore[arg-type]
    with pytest.raises(InvalidStageEventError, match="type"):
        store.put(b"", type="")
    assert files(store) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_raises(store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def on_a_full_disk(path: Any, flags: int, mode: int) -> int:
        os.close(opened(path, flags, mode))
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.put(PAYLOAD)
    assert files(store) == []


def test_threads_and_processes_share_a_folder(store: FolderPayloadStore) -> None:
    script = (
        "import sys; from evalvault_sdk.payload import FolderPayloadStore\n"
        "store = FolderPayloadStore(sys.argv[1])\n"
        "for number in range(100): print(store.put(b'%d' % number * 1000).id)"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    processes = [
        subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    start = threading.Barrier(4)

    def put_many(_: int) -> list[str]:
        start.wait(10)
        return [store.put(b"%d" % number * 1000).id for number in range(100)]

    with ThreadPoolExecutor(4) as threads:
        written = list(threads.map(put_many, range(4)))
    written += [process.communicate(timeout=60)[0].split() for process in processes]
    for ids in written:
        assert [store.get(StagePayloadRef("folder", id)) for id in ids] == [
            b"%d" % number * 1000 for number in range(100)
        ]
    assert len(files(store)) == 700


def test_purge_deletes_what_is_old_and_says_how_much(store: FolderPayloadStore) -> None:
    old, young = store.put(b"old"), store.put(b"young")
    age(store._path(old.id), 2 * HOUR)
    age(store._path(young.id), 0.5 * HOUR)
    assert store.purge(older_than_s=HOUR) == 1
    assert store.get(young) == b"young"
    with pytest.raises(LookupError):
        store.get(old)
    assert store.purge(0) == 1


def test_purge_deletes_unfinished_files_only_when_nobody_can_be_writing_them(store: FolderPayloadStore) -> None:
    path = store._path(store.put(b"").id)
    path = path.rename(path.with_suffix(".part"))
    age(path, 0.9 * HOUR)
    assert store.purge(0) == 0
    assert path.exists()
    age(path, 1.1 * HOUR)
    assert store.purge(2 * HOUR) == 0
    assert path.exists()
    assert store.purge(0) == 0, "it never was a payload"
    assert not path.exists()


def test_purge_leaves_what_is_not_its_own(store: FolderPayloadStore) -> None:
    path = store._path(store.put(b"").id)
    others = [store.folder / "notes.txt", path.with_name("notes.txt"), store.folder / ("0" * 32)]
    for other in others:
        other.write_text("mine")
        age(other, HOUR)
    assert store.purge(0) == 1
    assert sorted(files(store)) == sorted(others)


def test_purge_looks_into_every_subfolder(store: FolderPayloadStore) -> None:
    for number in range(256):
        path = store._path(f"{number:032x}")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    assert store.purge(0) == 256


def test_purge_of_a_folder_that_was_never_made_does_nothing(store: FolderPayloadStore) -> None:
    assert store.purge(0) == 0
    assert not store.folder.exists()


def test_two_that_purge_at_once_do_not_trip_over_each_other(
    store: FolderPayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [store.put(b"") for _ in range(3)]
    lstat = Path.lstat

    def purged_meanwhile(path: Path) -> os.stat_result:
        if path.name == refs[0].id:
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", purged_meanwhile)
    assert store.purge(0) == 2
