"""The segment store: what one process writes others read, torn or missing files cost their entries, the oldest go."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrl_hpc.store import segments
from ctrl_hpc.store.segments import Segments, merge_small


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()[:16]


def test_what_one_store_writes_another_reads_at_once(tmp_path: Path) -> None:
    with Segments(tmp_path / "store") as one, Segments(tmp_path / "store") as two:
        assert one.get(key(1)) is None and key(1) not in two
        one.put(key(1), b"a")
        two.put(key(2), b"")
        one.put(key(3), b"c" * 100_000)
        two.refresh()
        assert [two.get(key(n)) for n in (1, 2, 3, 4)] == [b"a", b"", b"c" * 100_000, None]
        one.refresh()
        assert one.get(key(2)) == b"" and key(3) in two
        assert len(list((tmp_path / "store").iterdir())) == 4


def test_many_entries_lie_in_sorted_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_RECENT", 10)
    with Segments(tmp_path) as one, Segments(tmp_path) as two:
        for n in range(500):
            (one if n % 3 else two).put(key(n), str(n).encode())
        one.put(key(7), b"newer")
        with Segments(tmp_path) as third:
            for store in (one, two, third):
                store.refresh()
                found = [store.get(key(n)) for n in range(500)]
                assert found[:7] + found[8:] == [str(n).encode() for n in range(500) if n != 7]
                assert store.get(key(500)) is None
            assert one.get(key(7)) == b"newer" and third.get(key(7)) in (b"7", b"newer") and len(third) == 501


@given(st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.binary(max_size=40)), max_size=40))
def test_any_keys_and_values(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[bytes, bytes]]) -> None:
    folder = tmp_path_factory.mktemp("store")
    known: dict[bytes, bytes] = {}
    with pytest.MonkeyPatch.context() as patch, Segments(folder) as store:
        patch.setattr(segments, "_RECENT", 3)
        for name, value in pairs:
            store.put(name, value)
            known[name] = value
        assert {name: store.get(name) for name in known} == known


def test_a_torn_end_costs_only_its_entry(tmp_path: Path) -> None:
    with Segments(tmp_path) as store:
        for n in range(3):
            store.put(key(n), b"value %d" % n)
    (values,), (index,) = tmp_path.glob("*.dat"), tmp_path.glob("*.idx")
    assert index.stat().st_size == 3 * 32
    values.write_bytes(values.read_bytes()[:-2])
    index.write_bytes(index.read_bytes() + b"torn")
    with Segments(tmp_path) as store:
        assert [store.get(key(n)) for n in range(3)] == [b"value 0", b"value 1", None]
        store.put(key(2), b"again")
        assert store.get(key(2)) == b"again"


def test_a_value_that_comes_later_than_its_index_entry_is_found_later(tmp_path: Path) -> None:
    with Segments(tmp_path / "a") as store:
        store.put(key(1), b"late")
    (values,), (index,) = (tmp_path / "a").glob("*.dat"), (tmp_path / "a").glob("*.idx")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / index.name).write_bytes(index.read_bytes())
    (tmp_path / "b" / values.name).write_bytes(b"")
    with Segments(tmp_path / "b") as store:
        assert store.get(key(1)) is None
        with open(tmp_path / "b" / values.name, "ab") as out:
            out.write(values.read_bytes())
        assert store.get(key(1)) == b"late"


def test_the_oldest_segments_make_room(tmp_path: Path) -> None:
    with Segments(tmp_path, max_bytes=160_000) as store, Segments(tmp_path, max_bytes=160_000) as reader:
        for n in range(400):
            store.put(key(n), b"%1000d" % n)
            reader.refresh()
            assert reader.get(key(n)) is not None
        assert sum(file.stat().st_size for file in tmp_path.glob("*.dat")) <= 160_000
        kept = [n for n in range(400) if store.get(key(n)) is not None]
        assert kept == list(range(kept[0], 400)) and 100 <= len(kept) <= 160
        assert [n for n in range(400) if reader.get(key(n)) is not None] == kept


def test_a_writer_whose_file_was_removed_begins_another(tmp_path: Path) -> None:
    with Segments(tmp_path, max_bytes=160_000) as store, Segments(tmp_path, max_bytes=160_000) as other:
        store.put(key("first"), b"1")
        for n in range(400):
            other.put(key(n), b"%1000d" % n)
        assert store.get(key("first")) in (None, b"1")  # its file is open, and its name has gone
        for n in range(10):
            store.put(key(f"then {n}"), b"%1000d" % n)
        assert other.get(key("then 9")) == b"%1000d" % 9


WRITER = """
import hashlib, sys
from pathlib import Path
from ctrl_hpc.store.segments import Segments
with Segments(Path(sys.argv[1])) as store:
    for n in range(2000):
        store.put(hashlib.sha256(f"{sys.argv[2]} {n}".encode()).digest()[:16], f"{sys.argv[2]} {n}".encode() * 9)
"""


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(w)]) for w in range(3)]
    with Segments(tmp_path) as store:
        while any(writer.poll() is None for writer in writers):
            found = store.get(key("1 1500"))
            assert found in (None, b"1 1500" * 9)
        assert [writer.returncode for writer in writers] == [0, 0, 0]
        store.refresh()
        assert all(store.get(key(f"{w} {n}")) == f"{w} {n}".encode() * 9 for w in range(3) for n in range(2000))
    assert len(list(tmp_path.iterdir())) == 6


def test_many_small_segments_become_one_and_readers_find_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SMALL_BYTES", 1000)
    keys = [bytes([n]) * 16 for n in range(40)]
    with Segments(tmp_path) as large:
        large.put(b"L" * 16, b"x" * 2000)
    for number, key in enumerate(keys[:31]):
        with Segments(tmp_path) as store:
            store.put(key, b"%d" % number)
            store.put(b"S" * 16, b"of %d" % number)
    assert merge_small(tmp_path / "none") == merge_small(tmp_path) == 0, "not many yet"
    with Segments(tmp_path) as store:
        store.put(keys[31], b"31")
        store.put(keys[31], b"31 again")
    torn = sorted(tmp_path.glob("*.dat"))[5]  # of writer 4
    torn.write_bytes(torn.read_bytes()[:1])
    with Segments(tmp_path) as reader:
        reader.refresh()
        assert reader.get(keys[0]) == b"0"
        assert merge_small(tmp_path) == 32
        assert len(list(tmp_path.iterdir())) == 4
        assert [reader.get(key) for key in keys[:31]] == [b"%d" % number for number in range(31)]
    with Segments(tmp_path) as fresh:
        assert fresh.get(keys[31]) == b"31 again" and fresh.get(b"L" * 16) == b"x" * 2000
        assert fresh.get(b"S" * 16) == b"of 30" and len(fresh) == 34


@pytest.mark.parametrize("recent", [1, 4096])
def test_a_reader_that_looks_in_the_midst_of_merging_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recent: int
) -> None:
    """The copies are there, and the originals still: what is known twice outlives either."""
    monkeypatch.setattr(segments, "_RECENT", recent)
    for number in range(35):
        with Segments(tmp_path) as store:
            store.put(key(number), b"%d" % number)
    with Segments(tmp_path) as reader:
        reader.refresh()
        unlink, looked = Path.unlink, []

        def watched(file: Path, missing_ok: bool = False) -> None:
            if not looked:
                reader.refresh()
                looked.append(len(reader))
            unlink(file, missing_ok)

        monkeypatch.setattr(Path, "unlink", watched)
        assert merge_small(tmp_path) == 35 and looked == [70]
        assert len(list(tmp_path.iterdir())) == 2
        reader.refresh()
        assert [reader.get(key(number)) for number in range(35)] == [b"%d" % number for number in range(35)]
