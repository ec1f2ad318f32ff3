from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import Precision
from bitwright.errors import OutputError, StudyError
from bitwright.search.results import Result
from bitwright.search.study import (
    SCHEMA_VERSION,
    Evaluation,
    Generation,
    Study,
    check_new,
    is_study,
    plan_text,
)
from bitwright.vocabulary import BIT_WIDTHS
from tests.search.fakes import evaluation, own_process

W4A8, W16A2 = Precision(4, 8), Precision(16, 2)
META = {"settings": {"seed": 1, "keep": {"é": "w8a8"}}, "facts": [1, None, 0.1]}


def numbers(folder: Path) -> list[int]:
    with Study(folder) as study:
        return [entry.number for entry in study.evaluations()]


def file_of(folder: Path) -> Path:
    return folder / "study.sqlite"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with two evaluations."""
    path = tmp_path / "study"
    with Study.create(path, META) as study:
        study.add(evaluation(1, 0.25, {"memory": 10.0}))
        study.add(evaluation(2, None, {}, status="failed"))
    return path


def script(text: str, *arguments: object) -> dict[str, Any]:
    """Arguments of :mod:`subprocess`: another process that imports what the tests import."""
    head = (
        "import os, signal, sys\n"
        "from bitwright.search.study import Study\n"
        "from tests.search.fakes import evaluation\n"
    )
    return own_process(head + textwrap.dedent(text), *arguments)


# -- what is written is read ---------------------------------------------------------------------


RESULTS = st.builds(
    Result,
    st.sampled_from(["ok", "stopped", "failed", "skipped"]),
    st.none() | st.floats(allow_nan=False),
    st.none() | st.floats(allow_nan=False),
    st.integers(0, 10**9),
    st.floats(0, 1e6),
    st.text(st.characters(exclude_categories=["Cs"])),
)
WIDTHS = st.sampled_from(BIT_WIDTHS)
PLANS = st.lists(st.builds(Precision, WIDTHS, WIDTHS), min_size=1, max_size=6).map(tuple)


@given(
    st.lists(
        st.tuples(
            PLANS,
            RESULTS,
            st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
            st.sampled_from(["baseline", "start", "search"]),
        ),
        max_size=4,
        unique_by=lambda entry: entry[0],
    )
)
@settings(max_examples=15, deadline=None)
def test_evaluations_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[Any, Any, Any, str]]
) -> None:
    folder = tmp_path_factory.mktemp("written") / "study"
    written = [
        Evaluation(number, plan, origin, result, gains)
        for number, (plan, result, gains, origin) in enumerate(entries, start=1)
    ]
    with Study.create(folder, {}) as study:
        for entry in reversed(written):  # by number, in whatever order they were finished
            study.add(entry)
        assert study.evaluations() == written
    with Study(folder) as study:
        assert study.evaluations() == written


def test_facts_of_a_study_are_read_as_they_were_written(folder: Path) -> None:
    with Study(folder, write=True) as study:
        assert study.meta("settings") == META["settings"]
        assert study.meta("facts") == META["facts"]
        assert study.meta("reference") is None
        study.set_meta("reference", ((10.0, 0.1), (-1.0, -4.0)))
        study.set_meta("ended", "all")
        study.set_meta("ended", "all generations are done")
    with Study(folder) as study:
        assert study.meta("reference") == [[10.0, 0.1], [-1.0, -4.0]]
        assert study.meta("ended") == "all generations are done"


def test_the_course_of_a_search_stays_as_it_was_first(folder: Path) -> None:
    first = [Generation(n, 10 * n, n / 8, 1.5 * n) for n in range(3)]
    with Study(folder, write=True) as study:
        for entry in reversed(first):
            study.set_generation(entry)
        # An interrupted search repeats its generations faster than they were.
        study.set_generation(Generation(1, 10, 1 / 8, 0.001))
        assert study.generations() == first


def test_errors_on_test_data_and_sensitivities(folder: Path) -> None:
    with Study(folder, write=True) as study:
        study.set_test((W4A8, W16A2), 0.5, 100)
        study.set_test((W4A8, W16A2), 0.25, 100)
        study.set_sensitivity("conv", W4A8, Result("ok", 0.125))
        study.set_sensitivity("conv", W16A2, Result("failed", None, message="NaN"))
        study.set_sensitivity("fc", W4A8, Result("ok", 0.5))
    with Study(folder) as study:
        assert study.tests() == {plan_text((W4A8, W16A2)): (0.25, 100)}
        assert study.sensitivity() == {"conv": {W4A8: 0.125, W16A2: None}, "fc": {W4A8: 0.5}}


def test_plans_are_texts_in_the_order_of_layers() -> None:
    assert plan_text((W4A8, W16A2)) == "w4a8,w16a2"


def test_a_plan_or_a_number_cannot_stand_twice(folder: Path) -> None:
    again = evaluation(1, 0.5, {})
    with Study(folder, write=True) as study:
        with pytest.raises(StudyError):
            study.add(again)
        with pytest.raises(StudyError):
            study.add(Evaluation(7, again.plan, "search", again.result, {}))
        study.add(evaluation(3, 0.5, {}))
    assert numbers(folder) == [1, 2, 3]


# -- interruptions -------------------------------------------------------------------------------


def test_all_that_was_added_survives_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    program = script(
        """
        with Study.create(sys.argv[1], {}) as study:
            for number in range(1, 10**6):
                study.add(evaluation(number, 0.5, {"memory": 1.0}))
                os.write(1, f"{number}\\n".encode())
        """,
        folder,
    )
    with subprocess.Popen(**program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(25):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = [25, *map(int, process.stdout.read().split())][-1]
    assert process.returncode == -signal.SIGKILL
    found = numbers(folder)
    # One more may have been written, and not told yet.
    assert found in (list(range(1, told + 1)), list(range(1, told + 2)))
    with Study(folder, write=True) as study:
        assert study.evaluations()[-1] == evaluation(found[-1], 0.5, {"memory": 1.0})
        study.add(evaluation(found[-1] + 1, 0.5, {}))


@pytest.fixture(scope="module")
def killed_in_a_transaction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with one evaluation, and half of a transaction that never ended."""
    folder = tmp_path_factory.mktemp("killed") / "study"
    program = script(
        """
        study = Study.create(sys.argv[1], {})
        study.add(evaluation(1, 0.5, {"memory": 1.0}))
        database = study._database
        # Larger than SQLite's cache, so that a part of it is on disk.
        database.execute("PRAGMA cache_size = 1")
        database.execute("UPDATE evaluations SET message = 'half'")
        for number in range(200):
            database.execute("INSERT INTO meta VALUES (?, ?)", (f"k{number}", "x" * 2000))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        folder,
    )
    assert subprocess.run(**program, check=False).returncode == -signal.SIGKILL
    assert sum(path.stat().st_size for path in folder.iterdir()) > 200_000
    return folder


@pytest.fixture
def killed(killed_in_a_transaction: Path, tmp_path: Path) -> Path:
    """A copy of it, as whoever opens it mends it."""
    return Path(shutil.copytree(killed_in_a_transaction, tmp_path / "killed"))


@pytest.mark.parametrize("write", [False, True], ids=["reader", "writer"])
def test_what_a_kill_left_half_written_is_taken_back(killed: Path, write: bool) -> None:
    with Study(killed, write=write) as study:
        assert study.evaluations() == [evaluation(1, 0.5, {"memory": 1.0})]
        assert study.meta("k1") is None


def test_a_study_that_was_closed_is_one_file(folder: Path) -> None:
    # Which can be copied, and read where nothing can be written.
    with Study(folder) as reader:
        reader.evaluations()
        with Study(folder, write=True) as study:
            study.add(evaluation(3, 0.5, {}))
    with Study(folder, write=True) as study:
        study.add(evaluation(4, 0.5, {}))
    assert {path.name for path in folder.iterdir()} == {"study.sqlite", "lock"}
    copy = folder.parent / "copy"
    copy.mkdir()
    file_of(copy).write_bytes(file_of(folder).read_bytes())
    assert numbers(copy) == [1, 2, 3, 4]


def test_a_second_writer_is_refused_until_the_first_has_ended(folder: Path) -> None:
    program = script(
        """
        with Study(sys.argv[1], write=True) as study:
            print("ready", flush=True)
            sys.stdin.read()
        """,
        folder,
    )
    with subprocess.Popen(**program, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(StudyError, match="being written by another search") as caught:
            Study(folder, write=True)
        assert caught.value.exit_code == 2
        assert numbers(folder) == [1, 2]  # readers are not
        process.kill()
    with Study(folder, write=True) as study:  # a lock does not outlive its process
        study.add(evaluation(3, 0.5, {}))
        with pytest.raises(StudyError, match="being written"):  # nor twice in this one
            Study(folder, write=True)


def test_a_reader_sees_whole_evaluations_while_another_process_writes(folder: Path) -> None:
    program = script(
        """
        import select
        with Study(sys.argv[1], write=True) as study:
            number = 2
            while not select.select([sys.stdin], [], [], 0)[0]:
                number += 1
                study.add(evaluation(number, 0.5, {"memory": 1.0}))
            print(number)
        """,
        folder,
    )
    with subprocess.Popen(**program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = [2]
        while len(set(seen)) < 5 and process.poll() is None:
            found = numbers(folder)
            assert found == list(range(1, len(found) + 1))
            assert len(found) >= seen[-1]
            seen.append(len(found))
            time.sleep(0.02)
        process.stdin.close()
        told = int(process.stdout.read())
    assert process.returncode == 0
    assert numbers(folder) == list(range(1, told + 1))


# -- disks ---------------------------------------------------------------------------------------


def succeeds(*command: str) -> bool:
    return not subprocess.run(command, check=False, capture_output=True).returncode


def mounted(folder: Path, *options: str) -> bool:
    return succeeds("mount", *options, str(folder))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or not mounted(folder, "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        pytest.skip("disks can be mounted by the superuser only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(study: Study, number: int) -> tuple[int, OutputError]:
    """Add evaluations until nothing more can be written; return the last number, and why."""
    while number < 10**4:
        try:
            study.add(evaluation(number, 0.5, {"memory": float(number)}))
        except OutputError as error:
            return number - 1, error
        number += 1
    raise AssertionError("the disk has no end")


def test_a_full_disk_loses_no_evaluation(small_disk: Path) -> None:
    folder, filling = small_disk / "study", small_disk / "filling"
    with Study.create(folder, META) as study:
        filling.write_bytes(bytes(40 << 10))
        added, error = fill(study, 1)
        assert added > 10
        assert error.what == "cannot be written (database or disk is full)"
        assert error.exit_code == 2
        assert "bitwright search --resume" in (error.fix or "")
        # The same object can be read, and goes on where there is space again.
        assert [entry.number for entry in study.evaluations()] == list(range(1, added + 1))
        filling.unlink()
        study.add(evaluation(added + 1, 0.5, {}))
    with Study(folder, write=True) as study:
        study.add(evaluation(added + 2, 0.5, {}))
        assert study.meta("settings") == META["settings"]
    assert numbers(folder) == list(range(1, added + 3))


def test_a_disk_that_is_full_before_the_study_keeps_nothing_of_it(small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(500 << 10))
    folder = small_disk / "study"
    with pytest.raises(OutputError, match="cannot be written"):
        Study.create(folder, META)
    assert not folder.exists()
    folder.mkdir()  # a folder of the user's stays, empty
    with pytest.raises(OutputError, match="cannot be written"):
        Study.create(folder, META)
    assert list(folder.iterdir()) == []


def test_a_limit_on_the_size_of_files_loses_no_evaluation(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Study(folder, write=True) as study:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        try:
            told, error = fill(study, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert told > 12
        assert "cannot be written" in error.what
        assert [entry.number for entry in study.evaluations()] == list(range(1, told + 1))
        study.add(evaluation(told + 1, 0.5, {}))
    assert numbers(folder) == list(range(1, told + 2))


@contextmanager
def mounted_read_only(folder: Path) -> Iterator[Path]:
    """The folder that the study lies in, as on a disk that was mounted read-only."""
    path = folder.parent / "read-only"
    path.mkdir()
    if os.geteuid() or not mounted(path, "--bind", str(folder.parent)):
        pytest.skip("disks can be mounted by the superuser only")
    try:
        assert mounted(path, "-o", "remount,bind,ro")
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def read_only(folder: Path) -> Iterator[Path]:
    with mounted_read_only(folder) as path:
        yield path


def test_a_study_on_a_read_only_disk_is_read_and_not_written(read_only: Path) -> None:
    assert numbers(read_only / "study") == [1, 2]
    with pytest.raises(OutputError, match="Read-only") as caught:
        Study(read_only / "study", write=True)
    assert caught.value.exit_code == 2
    assert "bitwright front" in (caught.value.fix or "")
    with Study(read_only / "study") as study, pytest.raises(OutputError, match="readonly"):
        study.add(evaluation(3, 0.5, {}))


def test_a_new_study_in_a_read_only_folder_is_refused_before_the_work(read_only: Path) -> None:
    for write in (check_new, lambda path: Study.create(path, {})):
        with pytest.raises(OutputError, match="is read-only") as caught:
            write(read_only / "new")
        assert caught.value.where == str(read_only)


def test_a_killed_study_on_a_read_only_disk_is_read_whole_or_not_at_all(killed: Path) -> None:
    with mounted_read_only(killed) as path:
        assert numbers(path / killed.name) == [1]
        # The index of SQLite's log is gone, as after a copy that took the others alone.
        (killed / "study.sqlite-shm").unlink()
        with pytest.raises(StudyError, match="cannot be read"):
            Study(path / killed.name)


def test_a_folder_in_which_nothing_can_be_made_is_not_written(folder: Path) -> None:
    if not succeeds("chattr", "+i", str(folder)):
        pytest.skip("this file system has no folders that cannot change")
    try:
        assert numbers(folder) == [1, 2]
        # SQLite says no more than "unable to open".
        with pytest.raises(OutputError, match="cannot be written") as caught:
            Study(folder, write=True)
        assert caught.value.fix
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    with Study(folder, write=True) as study:
        study.add(evaluation(3, 0.5, {}))
    assert numbers(folder) == [1, 2, 3]


def test_a_process_that_cannot_open_more_files_is_told_so(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with folder.joinpath("other").open("wb") as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
        try:
            with pytest.raises(StudyError, match="cannot be read"):
                Study(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_system_without_locks_is_named_as_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None is at hand: some network file systems answer so.
    def flock(handle: int, operation: int) -> None:  # noqa: ARG001
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="No locks available"):
        Study(folder, write=True)


# -- folders -------------------------------------------------------------------------------------


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd" / "study.sqlite").mkdir(parents=True)
    for name in ("file", "folder", "odd", "nothing", "x" * 300):
        assert not is_study(tmp_path / name)
        for write in (False, True):
            with pytest.raises(StudyError, match="is no study") as caught:
                Study(tmp_path / name, write=write)
            assert caught.value.exit_code == 2
            assert caught.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "odd"}
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_new_study_needs_an_empty_folder_or_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (folder, "holds a study already"),
        (tmp_path / "file", "exists already"),
        (tmp_path / "full", "exists already"),
        (tmp_path / "no" / "study", "does not exist"),
        (tmp_path / "file" / "study", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be used"),
    ):
        for write in (check_new, lambda path: Study.create(path, {})):
            with pytest.raises(OutputError, match=message) as caught:
                write(path)
            assert caught.value.exit_code == 2
    assert numbers(folder) == [1, 2]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    for name in ("empty", "new"):
        check_new(tmp_path / name)
        with Study.create(tmp_path / name, {}) as study:
            study.add(evaluation(1, 0.5, {}))
        assert is_study(tmp_path / name)


def test_a_study_can_be_made_and_read_with_a_relative_path_and_odd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("study", "with space", "100%?mode=memory#1", "Prüfung"):
        with Study.create(name, {}) as study:
            study.add(evaluation(1, 0.5, {}))
        assert numbers(tmp_path / name) == [1]
    assert len(list(tmp_path.iterdir())) == 4


def test_closing_twice_is_no_harm(folder: Path) -> None:
    study = Study(folder, write=True)
    study.close()
    study.close()


# -- other versions, damage ----------------------------------------------------------------------


def set_version(folder: Path, text: str) -> None:
    with closing(sqlite3.connect(file_of(folder))) as database, database:
        database.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (text,))


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    "version, hint",
    [(SCHEMA_VERSION + 1, "the version of bitwright that wrote it"), (0, "search again")],
)
def test_studies_of_other_schemas_are_refused_and_left_alone(
    folder: Path, version: int, hint: str, write: bool
) -> None:
    set_version(folder, str(version))
    before = file_of(folder).read_bytes()
    with pytest.raises(StudyError, match=f"has schema version {version}") as caught:
        Study(folder, write=write)
    assert hint in (caught.value.fix or "")
    assert caught.value.exit_code == 2
    assert file_of(folder).read_bytes() == before
    # A writer that was refused holds no lock.
    set_version(folder, str(SCHEMA_VERSION))
    with Study(folder, write=True) as study:
        assert len(study.evaluations()) == 2


def damage(folder: Path, how: str) -> None:
    file = file_of(folder)
    content = file.read_bytes()
    if how == "text":
        file.write_text("this is no database, however long it is " * 100)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "short":
        file.write_bytes(content[: len(content) // 3])
    elif how == "zeros":
        file.write_bytes(content[:4096] + bytes(len(content) - 4096))
    else:
        with closing(sqlite3.connect(file)) as database, database:
            database.execute(how)


@pytest.mark.parametrize(
    "how",
    [
        "text",
        "empty",
        "short",
        "zeros",
        "DROP TABLE evaluations",
        "DROP TABLE meta",
        "DELETE FROM meta",
        "UPDATE meta SET value = '{' WHERE key = 'schema'",
        "UPDATE meta SET value = '\"1\"' WHERE key = 'schema'",
        "UPDATE evaluations SET plan = 'w3a3' WHERE number = 1",
        "UPDATE evaluations SET plan = x'00ff' WHERE number = 1",
        "UPDATE evaluations SET gains = '{\"memory\": ' WHERE number = 1",
        "UPDATE evaluations SET gains = '[1]' WHERE number = 1",
        "UPDATE evaluations SET gains = '{\"memory\": null}' WHERE number = 1",
        'UPDATE evaluations SET gains = \'{"memory": "much"}\' WHERE number = 1',
    ],
)
def test_a_damaged_study_is_named_as_that(folder: Path, how: str) -> None:
    damage(folder, how)
    with (
        pytest.raises(StudyError, match=r"is damaged|cannot be read") as caught,
        Study(folder) as study,
    ):
        study.evaluations()
    assert caught.value.where == str(folder)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("offset", range(0, 4096 * 10, 2048))
def test_any_damaged_page_gives_an_error_of_ours_or_the_truth(folder: Path, offset: int) -> None:
    content = bytearray(file_of(folder).read_bytes())
    content[offset : offset + 512] = b"\xa5" * len(content[offset : offset + 512])
    file_of(folder).write_bytes(content)
    error = error_of_reading(folder)
    assert error is None or error.where == str(folder)


def error_of_reading(folder: Path) -> StudyError | None:
    try:
        with Study(folder) as study:
            for read in (study.evaluations, study.generations, study.tests, study.sensitivity):
                read()
            study.meta("settings")
    except StudyError as error:
        return error
    return None


def test_facts_that_are_no_json_are_damage(folder: Path) -> None:
    damage(folder, "UPDATE meta SET value = '{]' WHERE key = 'settings'")
    with Study(folder) as study, pytest.raises(StudyError, match="is damaged"):
        study.meta("settings")


def test_sensitivities_of_no_precision_are_damage(folder: Path) -> None:
    with Study(folder, write=True) as study:
        study.set_sensitivity("conv", W4A8, Result("ok", 0.125))
    damage(folder, "UPDATE sensitivity SET precision = 'all'")
    with Study(folder) as study, pytest.raises(StudyError, match="is damaged"):
        study.sensitivity()
