"""Run a list of commands on several GPUs, those of one GPU one after the other.

    python -m bench.lanes JOBS OUT

A line of JOBS: which GPUs (``0``, or ``0,1``), seconds at the most, a name, and a bash command. A
job begins when all jobs before it that share one of its GPUs have ended, whatever became of them.
It sees its GPUs alone (``CUDA_VISIBLE_DEVICES``), and as many cores as its share of the GPUs.
What it prints comes to OUT/NAME.log; OUT/status says, line by line, what ended when and how (124:
its time was over). A name that OUT/status already has is left out: run it again after changes to
JOBS. ``after:NAME`` as the first word of a command waits for that job, too, and leaves this one out
where it failed (125).
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIME_OVER, LEFT_OUT = 124, 125
LINE = re.compile(r"(\d+(?:,\d+)*)\s+(\d+(?:\.\d+)?)\s+([\w.-]+)\s+(?:after:([\w.-]+)\s+)?"
                  r"(?!after:)(.*\S.*)")
SAVE_S = 20.0
"""A job whose time is over is asked to end, and after so long made to."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command and what it needs."""

    gpus: frozenset[int]
    limit_s: float
    name: str
    command: str
    after: str = ""

    @classmethod
    def read(cls, line: str) -> Job:
        """Read a line. Raises `ValueError` with what is wrong."""
        found = LINE.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"{line!r}: write GPUS SECONDS NAME COMMAND, as in 0,1 600 name ls; a "
                             "name has letters, digits, '.', '_' and '-'")
        gpus, limit, name, after, command = found.groups()
        return cls(frozenset(map(int, gpus.split(","))), float(limit), name, command, after or "")


def read_jobs(text: str) -> list[Job]:
    """Read all lines that are not empty or comments. Raises `ValueError` for a wrong one."""
    lines = [line.strip() for line in text.splitlines()]
    jobs = [Job.read(line) for line in lines if line and line[0] != "#"]
    if not jobs:
        raise ValueError("there are no jobs")
    names = [job.name for job in jobs]
    for number, job in enumerate(jobs):
        if job.name in names[:number]:
            raise ValueError(f"two jobs are named {job.name}")
        if job.after and job.after not in names[:number]:
            raise ValueError(f"{job.name} is after {job.after}, which no earlier job is named")
    return jobs


class Lanes:
    """The jobs of one call."""

    def __init__(self, jobs: Sequence[Job], out: Path) -> None:
        self._jobs, self._out = jobs, out
        self._status, self._lock = out / "status", threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        lines = self._status.read_text().splitlines() if self._status.exists() else []
        found = [re.match(r"(\S+) (-?\d+) ", line) for line in lines]
        self._codes = {one[1]: int(one[2]) for one in found if one}  # a cut line does not count
        self._ended = {job.name: threading.Event() for job in jobs}
        self._is_over = threading.Event()

    def run(self) -> int:
        """Run what has not run; returns the number of jobs that failed. SIGTERM and Ctrl-C end what
        runs, and no other job begins."""
        threads = [threading.Thread(target=self._follow, args=(number,))
                   for number in range(len(self._jobs))]
        before = signal.signal(signal.SIGTERM, lambda *_: self._is_over.set())
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.1)
        except KeyboardInterrupt:
            self._is_over.set()
        finally:
            for thread in threads:
                thread.join()
            signal.signal(signal.SIGTERM, before)
        return sum(self._codes.get(job.name) != 0 for job in self._jobs)

    def _follow(self, number: int) -> None:
        job = self._jobs[number]
        for other in self._jobs[:number]:
            if other.gpus & job.gpus or other.name == job.after:
                self._ended[other.name].wait()
        try:
            if job.name not in self._codes and not self._is_over.is_set():
                self._run(job)
        finally:
            self._ended[job.name].set()

    def _run(self, job: Job) -> None:
        begin = time.monotonic()
        fails = job.after and self._codes.get(job.after) != 0
        code = LEFT_OUT if fails else self._do(job)
        if self._is_over.is_set():
            return  # it runs anew in the next call
        with self._lock:
            self._codes[job.name] = code
            with self._status.open("a") as status:
                status.write(f"{job.name} {code} {time.monotonic() - begin:.0f} s, "
                             f"{time.strftime('%H:%M:%S')}\n")

    def _do(self, job: Job) -> int:
        every = sorted(frozenset().union(*(other.gpus for other in self._jobs)))
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // len(every))
        own = [core for gpu in sorted(job.gpus)
               for core in cores[every.index(gpu) * share : (every.index(gpu) + 1) * share]]
        command = ["taskset", "-c", ",".join(map(str, own or cores)), "bash", "-c", job.command]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(job.gpus)))}
        with (self._out / f"{job.name}.log").open("wb") as log:
            log.write(f"$ {shlex.join(command[3:])}\n".encode())
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)
            end = time.monotonic() + job.limit_s
            try:
                while time.monotonic() < end and not self._is_over.is_set():
                    if (code := process.poll()) is not None:
                        return code
                    time.sleep(0.05)
                return TIME_OVER
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a job, its children too, which may first save what they have."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + SAVE_S
        try:
            os.killpg(process.pid, what)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def main(arguments: Sequence[str]) -> int:
    """Run the jobs of a file."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        jobs = read_jobs(Path(arguments[0]).read_text())
    except (OSError, ValueError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 2
    try:
        return 1 if Lanes(jobs, Path(arguments[1])).run() else 0
    except OSError as error:
        print(f"{arguments[1]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
