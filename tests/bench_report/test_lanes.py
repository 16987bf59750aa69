"""Jobs of several GPUs: what waits for what, and what becomes of those that fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lanes import Job, Lanes, main, read_jobs

ROOT = Path(__file__).resolve().parents[2]


def status(out: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in
            (out / "status").read_text().splitlines()}


def test_a_line() -> None:
    assert Job.read("0,1 30 both after:one run it $HOME") == Job(
        frozenset({0, 1}), 30.0, "both", "run it $HOME", "one")


@pytest.mark.parametrize(("text", "said"), [
    ("0 30 name", "write GPUS SECONDS NAME COMMAND"),
    ("0 nan name true", "write GPUS SECONDS NAME COMMAND"),
    ("0 30 a/b true", "write GPUS SECONDS NAME COMMAND"),
    ("0 30 a true\n0 30 b after:a", "write GPUS SECONDS NAME COMMAND"),
    ("# nothing", "there are no jobs"),
    ("0 30 a true\n1 30 a true", "two jobs are named a"),
    ("0 30 a after:b true", "a is after b, which no earlier job is named"),
])
def test_wrong_jobs(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").write_text(text)
    assert main([str(tmp_path / "jobs"), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_jobs_of_one_gpu_follow_each_other(tmp_path: Path) -> None:
    """Those of several wait for all of theirs; those of different ones run beside each other."""
    order = tmp_path / "order"
    jobs = read_jobs(f"""# comment
0 20 a sleep 0.6; echo a $CUDA_VISIBLE_DEVICES >> {order}

1 20 b echo b $CUDA_VISIBLE_DEVICES >> {order}
0,1 20 c echo c $CUDA_VISIBLE_DEVICES >> {order}
1 20 d echo d >> {order}
""")
    assert Lanes(jobs, tmp_path / "out").run() == 0
    assert order.read_text().splitlines() == ["b 1", "a 0", "c 0,1", "d"]
    assert Lanes(jobs, tmp_path / "out").run() == 0, "all have run: nothing runs again"
    assert len(order.read_text().splitlines()) == 4


def test_what_fails_holds_up_what_is_after_it_alone(tmp_path: Path) -> None:
    jobs = read_jobs("0 20 a exit 3\n0 20 b after:a echo never\n0 20 c echo there")
    assert Lanes(jobs, tmp_path).run() == 2
    assert status(tmp_path) == {"a": 3, "b": 125, "c": 0}
    assert (tmp_path / "c.log").read_text().endswith("there\n")
    assert not (tmp_path / "b.log").exists()


def test_time_is_over_for_children_too(tmp_path: Path) -> None:
    """They may save what they have; one that does not end is made to."""
    child, saved = tmp_path / "child", tmp_path / "saved"
    jobs = read_jobs(
        f"0 0.5 a (trap 'sleep 0.5; touch {saved}; exit' TERM; sleep 2 & wait; touch {child}) & "
        "sleep 30")
    begin = time.monotonic()
    assert Lanes(jobs, tmp_path).run() == 1
    assert time.monotonic() - begin < 8 and status(tmp_path) == {"a": 124}
    assert saved.exists() and not child.exists()


def test_what_does_not_end_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.lanes.SAVE_S", 0.5)
    jobs = read_jobs("0 0.3 a trap '' TERM; for i in 1 2 3 4 5 6 7 8 9; do sleep 1; done")
    begin = time.monotonic()
    assert Lanes(jobs, tmp_path).run() == 1
    assert time.monotonic() - begin < 5


def test_a_call_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    """What ran runs anew in the next call."""
    pid, jobs = tmp_path / "pid", tmp_path / "jobs"
    jobs.write_text(f"0 60 a echo $$ > {pid}; sleep 50\n0 60 b true\n")
    call = subprocess.Popen([sys.executable, "-m", "bench.lanes", jobs, tmp_path / "out"], cwd=ROOT)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    call.send_signal(signal.SIGTERM)
    assert call.wait(20) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (tmp_path / "out" / "status").exists()
