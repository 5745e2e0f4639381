import json

import pytest

from pipeline import runfolder
from pipeline.config import ConfigError
from pipeline.errors import StorageError
from pipeline.runfolder import RunFolder


@pytest.fixture
def folder(tmp_path):
    found = RunFolder(tmp_path / "run")
    found.prepare()
    found.launch = "this"
    return found


@pytest.fixture
def clock(monkeypatch):
    """Seconds since 1970 as failures are dated, set by a test."""
    now = [0.0]
    monkeypatch.setattr(runfolder.time, "time", lambda: now[0])
    return now


def fail(folder, rank, text, clock, at, *, lost_peer, code=1):
    clock[0] = at
    folder.add_failure(rank, RuntimeError(text), code, lost_peer=lost_peer)


def test_a_ranks_own_failure_comes_before_the_loss_of_a_peer_whichever_was_written_first(folder, clock):
    fail(folder, 0, "Connection closed by peer", clock, at=1, lost_peer=True)
    fail(folder, 2, "Connection reset by peer", clock, at=2, lost_peer=True)
    fail(folder, 1, "out of memory", clock, at=3, lost_peer=False, code=74)
    reason, code = folder.root_cause(0)
    assert reason.startswith("rank 1 on ")
    assert reason.endswith("RuntimeError: out of memory")
    assert code == 74


def test_of_two_own_failures_the_earlier_one_is_the_cause_whichever_line_is_first(folder, clock):
    fail(folder, 0, "second", clock, at=9, lost_peer=False)
    fail(folder, 1, "first", clock, at=5, lost_peer=False, code=65)
    assert folder.root_cause(0)[0].endswith("RuntimeError: first")
    assert folder.root_cause(0)[1] == 65


def test_where_all_only_lost_another_that_is_what_is_told(folder, clock):
    fail(folder, 3, "Connection closed by peer", clock, at=2, lost_peer=True)
    fail(folder, 0, "Timed out", clock, at=1, lost_peer=True)
    reason, code = folder.root_cause(0.1)
    assert reason.startswith("lost another rank, killed or out of reach: rank 0 on ")
    assert code == 1


def test_failures_of_an_earlier_start_are_no_cause(folder, clock):
    folder.launch = "an earlier one"
    fail(folder, 1, "old", clock, at=1, lost_peer=False)
    folder.launch = "this"
    fail(folder, 0, "new", clock, at=2, lost_peer=False)
    assert folder.root_cause(0)[0].endswith("RuntimeError: new")


def test_it_waits_for_a_rank_that_says_more_than_that_it_lost_another(folder, clock, monkeypatch):
    fail(folder, 0, "Connection closed by peer", clock, at=2, lost_peer=True)
    monkeypatch.setattr(runfolder.time, "sleep", lambda _s: fail(folder, 1, "the cause", clock, at=1, lost_peer=False))
    assert folder.root_cause(60)[0].endswith("RuntimeError: the cause")


def test_a_failure_is_one_line_however_much_there_is_to_say(folder, clock):
    fail(folder, 0, "x" * 100_000 + "\n\n", clock, at=1, lost_peer=False)
    (line,) = (folder.path / "failures.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["rank"], found["exit_code"], found["lost_peer"], found["launch"]) == (0, 1, False, "this")
    assert found["error"].startswith("RuntimeError: xxx")
    assert len(found["error"]) == 1000
    assert len(found["traceback"]) == 4000


def test_status_keeps_what_it_is_not_told_to_change_and_the_newest_events(folder):
    assert folder.status == {}
    folder.update(state="running", images_seen=8)
    folder.update(images_seen=16)
    assert folder.status == {"state": "running", "images_seen": 16}
    for i in range(60):
        folder.add_event(f"event {i}", i)
    assert [event["text"] for event in folder.status["events"]] == [f"event {i}" for i in range(10, 60)]
    (folder.path / "status.json").write_text('{"state": "runn')
    assert folder.status == {}, "cut short by a crash"


def test_replaced_files_are_named_one_a_line(folder):
    folder.add_replaced([("a.jpg", "is empty")])
    folder.add_replaced([("b\udcff.jpg", "does not decode")])
    assert (folder.path / "replaced.txt").read_text() == "a.jpg\tis empty\nb\\udcff.jpg\tdoes not decode\n"


def test_a_folder_is_made_with_its_parents_and_proved_to_be_writable(tmp_path):
    folder = RunFolder(tmp_path / "a/b/run")
    assert not folder.ready
    folder.prepare()
    assert folder.ready
    assert [p.name for p in folder.path.iterdir()] == ["samples"]


def test_a_file_or_a_path_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir must be a folder"):
        RunFolder(tmp_path / "run").prepare()
    with pytest.raises(StorageError, match="cannot write the run folder") as caught:
        RunFolder(tmp_path / "run/below").prepare()
    assert caught.value.exit_code == 74


def test_an_earlier_run_moves_aside_as_a_whole_and_the_next_one_beside_it(folder):
    assert folder.move_aside() is None, "an empty folder holds no run"
    for number in (1, 2):
        (folder.path / "stats.jsonl").write_text(f"{number}\n")
        folder.update(state="finished")
        (folder.path / "notes.txt").write_text("mine")
        aside = folder.move_aside()
        assert aside.name == f"replaced-{number:03d}"
        assert (aside / "stats.jsonl").read_text() == f"{number}\n"
        assert (aside / "status.json").exists()
        assert (folder.path / "notes.txt").exists(), "what is not ours stays"
        folder.prepare()
