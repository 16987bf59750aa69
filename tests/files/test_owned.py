"""A folder belongs to one run at a time, in this process and in others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longspan.errors import LongspanError
from longspan.files.owned import owned_folder

HOLD = """
import sys, time
from pathlib import Path
from longspan.files.owned import owned_folder
with owned_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """However it ends: the system lets go of a lock with its process."""
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    with first.stdout, first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(LongspanError, match="another run is writing there"), \
                owned_folder(tmp_path):
            pass
        first.kill()
    with owned_folder(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_new_folder_goes_again_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="no text"), owned_folder(tmp_path / "new"):
        raise LongspanError("no text")
    assert not list(tmp_path.iterdir())
    with owned_folder(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    with owned_folder(tmp_path / "new"):
        assert (tmp_path / "new" / "file").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LongspanError, match="is a file: name a folder"), \
            owned_folder(tmp_path / "file"):
        pass
