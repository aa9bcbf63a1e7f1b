"""Many trials shared by any number of workers: nothing is lost, nothing is done twice.

Optuna keeps a study in a database: an SQLite file on one machine, a PostgreSQL server for several. All trials are
queued when the study is made, each with its place in the queue, the *point*; workers take them off. A running trial
gives a sign of life, its heartbeat. One that is silent for three beats has lost its worker, and is queued again.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
import torch
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, make_url

from srmu.engine.progress import Watch
from srmu.errors import DivergedError, SrmuError, first_line

FILE = "study.db"  # in the output folder
RETRIES = 3  # of a point whose worker died; then it may be the point that kills them
POLL = 0.5  # seconds between looks at what other workers do
HEARTBEAT, LOCAL_HEARTBEAT = 60, 5  # seconds between signs of life, with a server and on one machine
ANSWERED = (TrialState.COMPLETE, TrialState.PRUNED)
PATIENCE = 60  # seconds to wait for another worker's hold on an SQLite file
Objective = Callable[[optuna.Trial], float | Sequence[float]]


class Study(optuna.Study):
    """A study that knows its database."""

    url: URL


class SurplusTrialError(Exception):
    """Nobody needs this trial: the queue just ran empty, or another worker has its point."""


class QueueStorage(RDBStorage):
    """A database that hands a trial to one worker, and hears of the trial before it runs."""

    def __init__(self, url: URL) -> None:
        local = url.drivername == "sqlite"
        heartbeat = LOCAL_HEARTBEAT if local else HEARTBEAT
        connect_args = {"timeout": PATIENCE, "isolation_level": None} if local else {"connect_timeout": 10}
        engine = {"pool_pre_ping": True, "connect_args": connect_args}
        address = url.render_as_string(hide_password=False)
        super().__init__(address, engine, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)
        if local:  # it has no SELECT FOR UPDATE, and locks when something is written: two could read that a trial waits
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        if state == TrialState.RUNNING:
            self.record_heartbeat(trial_id)  # else a worker killed right now is never missed
        return super().set_trial_state_values(trial_id, state, values)


def open_study(
    storage: str | Path,
    name: str,
    *,
    spec: Mapping[str, Any],
    directions: Sequence[Literal["minimize", "maximize"]],
    sampler: optuna.samplers.BaseSampler,
    queue: Sequence[Mapping[str, Any]],
) -> Study:
    """Make a study with its queue of trials, or join it; in `{}` the sampler chooses all values.

    `storage` is the path of an SQLite file or a server's URL. A longer queue than the study has is taken over.
    SrmuError where the study exists with another `spec`, or cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # of heartbeats, fixed samplers, metric names
    url = locate_database(storage)
    with redact_errors(url):
        database = connect_storage(url)
        optuna.create_study(storage=database, study_name=name, directions=[*directions], load_if_exists=True)
        study = Study(name, database, sampler=sampler)
        study.url = url
        wanted = json.loads(json.dumps(spec))
        known = study.user_attrs.get("spec", wanted)
        for key in dict.fromkeys([*wanted, *known]):
            was, now = known.get(key, "nothing"), wanted.get(key, "nothing")
            if was != now:
                raise SrmuError(
                    f"study {name!r} exists with another {key}: {str(was)[:60]}, here {str(now)[:60]}; "
                    "give this one another name or another out folder"
                )
        study.set_user_attr("spec", wanted)
        if len(queue) > len(study.user_attrs.get("queue", ())):
            study.set_user_attr("queue", [dict(params) for params in queue])
    return study


def locate_database(storage: str | Path) -> URL:
    """The database that a storage names; SrmuError where it names none."""
    if isinstance(storage, Path):
        storage.parent.mkdir(parents=True, exist_ok=True)
        return URL.create("sqlite", database=str(storage.resolve()))
    with suppress(exc.ArgumentError, ValueError):  # ValueError: of its port
        url = make_url(storage)
        if url.get_backend_name() in ("postgresql", "postgres"):
            return url.set(drivername="postgresql+psycopg")  # plain postgresql:// means another driver to SQLAlchemy
    raise SrmuError(
        "--storage: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE; "
        f"without one, {FILE} in the output folder is used"
    )


def connect_storage(url: URL, attempts: int = 5) -> QueueStorage:
    """The database of a study, which two workers may make at the same moment."""
    try:
        return QueueStorage(url)
    except ImportError:
        raise SrmuError("PostgreSQL needs a driver: pip install 'srmu[postgres]'") from None
    except exc.DatabaseError as error:
        two_at_once = isinstance(error, exc.IntegrityError) or "already exists" in str(error)
        if attempts == 1 or not two_at_once:
            raise
    time.sleep(POLL)
    return connect_storage(url, attempts - 1)


@contextmanager
def redact_errors(url: URL) -> Iterator[None]:
    """Make one line of what goes wrong with a storage, without its password and its options."""
    try:
        yield
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, exc.SQLAlchemyError) else error
        why = first_line(getattr(cause, "orig", None) or cause)
        for password in filter(None, (url.password, url.query.get("password"))):
            why = why.replace(str(password), "***")
        server = url.set(drivername="postgresql", query={}).render_as_string()  # hides the password
        place = url.database if url.drivername == "sqlite" else f"--storage {server}"
        raise SrmuError(f"{place} cannot be used: {why}") from None


def work_queue(
    study: Study,
    objective: Objective,
    watch: Watch,
    after: Callable[[], object] = lambda: None,
    *,
    in_turn: bool = False,
) -> None:
    """Take trials off the queue until all are done, those of other workers included.

    A trial that raises DivergedError is pruned, one that raises SrmuError or runs out of memory has failed:
    `user_attrs` say why. SrmuError where the first ones all fail. Whatever else ends a trial, its point is queued
    again. `after` is called when some have ended, here or at another worker. `in_turn`: no trial begins while another
    one runs, so that each knows all before it.
    """
    failures: list[str] = []
    with redact_errors(study.url):
        if not study.get_trials(deepcopy=False, states=ANSWERED):  # a mistake in what all have in common was mended
            queue_points(study, [point for point in list_points(study) if has_failed(point.standing)])
        left = sum(not point.is_over for point in list_points(study))
        with watch("trials", left) as tick:
            while True:
                optuna.storages.fail_stale_trials(study)
                points = list_points(study)
                before, left = left, sum(not point.is_over for point in points)
                for _ in range(before - left):
                    tick(describe_best(study))
                if left < before:
                    after()
                if not left:
                    return
                states = {point.standing.state for point in points if point.standing}
                if lost := [point for point in points if point.is_lost]:
                    queue_points(study, lost)
                elif TrialState.WAITING not in states or (in_turn and TrialState.RUNNING in states):
                    time.sleep(POLL)
                else:
                    take_trial(study, objective, failures, in_turn)
                    if len(failures) >= min(3, len(points)) and not study.get_trials(deepcopy=False, states=ANSWERED):
                        raise SrmuError(f"no trial succeeds: {failures[-1]}")


def take_trial(study: Study, objective: Objective, failures: list[str], in_turn: bool) -> None:
    """Run the next trial of the queue; add to `failures` why it failed."""

    def attempt(trial: optuna.Trial) -> float | Sequence[float]:
        standing = [point.standing for point in list_points(study) if point.standing]
        earlier = [t for t in standing if t.state == TrialState.RUNNING and t.number < trial.number]
        if trial.number not in {t.number for t in standing} or (in_turn and earlier):
            trial.set_user_attr("surplus", True)
            raise SurplusTrialError
        try:
            return objective(trial)
        except (SrmuError, torch.OutOfMemoryError) as error:
            why = first_line(error).replace(f"{Path.cwd()}/", "")  # files as they are named from here
            trial.set_user_attr("why", why)
            if isinstance(error, DivergedError):
                raise optuna.TrialPruned from None
            failures.append(why)
            raise
        except KeyboardInterrupt:
            trial.set_user_attr("stopped", True)
            raise

    try:
        study.optimize(attempt, n_trials=1, catch=(SurplusTrialError, SrmuError, torch.OutOfMemoryError))
    except KeyboardInterrupt:
        queue_points(study, [point for point in list_points(study) if point.is_lost])
        raise
    except (UpdateFinishedTrialError, ValueError) as error:
        # This process was not heard of for so long that another one has the trial now.
        if not (isinstance(error, UpdateFinishedTrialError) or "Cannot tell" in str(error)):
            raise  # of the objective


class Point(NamedTuple):
    """A place in the queue, with the trial that counts: the first that has not failed, else the last."""

    number: int
    params: Mapping[str, Any]
    standing: FrozenTrial | None
    is_lost: bool  # no worker has it; after `RETRIES` more dead workers it is given up

    @property
    def is_over(self) -> bool:
        return self.standing is not None and self.standing.state.is_finished() and not self.is_lost


def list_points(study: Study) -> list[Point]:
    """The queue as it is now; surplus trials are not in it."""
    trials: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in study.get_trials(deepcopy=False):
        if "surplus" not in trial.user_attrs:
            trials[trial.user_attrs.get("point", -1)].append(trial)
    points = []
    for number, params in enumerate(study.user_attrs["queue"]):
        own = trials[number]
        alive = [trial for trial in own if trial.state != TrialState.FAIL]
        standing = next(iter([*alive, *reversed(own)]), None)
        killed = [trial for trial in own if not {"why", "stopped"} & {*trial.user_attrs}]
        died = standing is not None and standing.state == TrialState.FAIL and not has_failed(standing)
        points.append(Point(number, params, standing, standing is None or (died and len(killed) <= RETRIES)))
    return points


def queue_points(study: Study, points: Sequence[Point]) -> None:
    """Queue a trial of each point. Two workers may do so at once: see `take_trial`."""
    for point in points:
        study.enqueue_trial(dict(point.params), user_attrs={"point": point.number})


def has_failed(trial: FrozenTrial | None) -> bool:
    """Whether it failed by itself, not for want of a worker."""
    return trial is not None and trial.state == TrialState.FAIL and "why" in trial.user_attrs


def list_trials(study: Study) -> list[dict[str, Any]]:
    """The trials in the order of the queue, as JSON files have them, with what each objective left as `measured`."""
    entries = []
    for trial in (point.standing for point in list_points(study) if point.standing):
        failed = trial.state == TrialState.FAIL
        entry = {
            "number": trial.number,
            "state": "failed" if failed else trial.state.name.lower(),
            "why": trial.user_attrs.get("why", "its worker died" if failed else ""),
            "params": trial.params or trial.system_attrs.get("fixed_params", {}),
            "values": {},
            "runs": [],
        }
        entries.append(entry | trial.user_attrs.get("measured", {}))
    return entries


def describe_best(study: Study) -> str:
    front = study.best_trials
    if len(study.directions) > 1:
        return f"{len(front)} on the front"
    return f"best {front[0].value:.4g} (trial {front[0].number})" if front else "none is complete yet"
