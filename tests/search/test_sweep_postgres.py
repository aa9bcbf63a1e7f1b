"""Two workers on a real PostgreSQL server, one killed; what a wrong address or password says.

`.ci/postgres pytest tests/search/test_sweep_postgres.py` starts a server and stops it again.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import make_url

from helpers.sweep_worker import POINTS, join
from srmu.errors import SrmuError

SERVER = os.environ.get("SRMU_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not SERVER, reason="no PostgreSQL: run `.ci/postgres make test`, which starts one")


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    def started() -> set[str]:
        return {path.name for path in tmp_path.glob("started-*")}

    def wait_for(count: int) -> None:
        end = time.monotonic() + 120
        while len(started()) < count and time.monotonic() < end:
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.05)
        assert len(started()) == count

    (tmp_path / "hold").touch()
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "sweep_worker.py"), SERVER]
    # both at once: the tables and the study are made by one of them
    workers = [subprocess.Popen([*command, str(tmp_path)]) for _ in range(2)]
    try:
        wait_for(2)  # each is in a trial of its own
        workers[0].kill()
        workers[0].wait()
        (tmp_path / "hold").unlink()
        assert workers[1].wait(timeout=120) == 0
    finally:
        for worker in workers:
            worker.kill()
    study = join(SERVER)
    states = Counter(trial.state for trial in study.trials)
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(t.params["x"] for t in complete) == list(range(POINTS))
    killed = next(n for n in started() if n.endswith(f"-{workers[0].pid}")).split("-")[1]
    failed = [t for t in study.trials if t.state == TrialState.FAIL and "surplus" not in t.user_attrs]
    assert [t.params["x"] for t in failed] == [float(killed)]
    assert not states[TrialState.RUNNING] and not states[TrialState.WAITING]
    # the killed one was begun twice, each other once
    assert Counter(n.split("-")[1] for n in started()) == {
        str(point): 1 + (str(point) == killed) for point in range(POINTS)
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", ["password", "port"])
def test_a_server_out_of_reach_is_one_line(part: str) -> None:
    changed = {"password": "s3cret"} | ({"port": 1} if part == "port" else {})
    url = make_url(SERVER).set(**changed).render_as_string(hide_password=False)
    with pytest.raises(SrmuError) as error:
        join(url)
    assert "s3cret" not in str(error.value)
    assert "cannot be used" in str(error.value)
    assert "\n" not in str(error.value)
    assert ("password" in str(error.value)) == (part == "password")
