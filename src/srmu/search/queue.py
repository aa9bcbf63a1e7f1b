"""Many trials shared by any number of workers: nothing is lost, nothing is done twice.

Optuna keeps the study and chooses values. All trials are queued when the study is made, each with
its number in the queue, the *point*; workers take them off. The storage is a journal file or a
PostgreSQL server. A worker that dies leaves a trial that is running for ever: the server misses its
heartbeat; beside a journal each worker holds a lock on a file, which the system gives back.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from srmu.engine.progress import Watch
from srmu.errors import DivergedError, SrmuError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RETRIES = 3  # of a trial whose worker died; then it may be the trial that kills them
POLL = 0.5  # seconds between looks at what other workers do
Objective = Callable[[optuna.Trial], float | Sequence[float]]

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ExperimentalWarning)
    again = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


class Study(optuna.Study):
    """A study that knows its storage, and where its workers' locks are beside a journal."""

    place: str | Path = ""
    workers: Path | None = None


class Surplus(Exception):  # noqa: N818 - nothing went wrong
    """A trial that nobody needs: the queue just ran empty, or another worker has this point."""


def open_study(
    storage: str | Path,
    name: str,
    *,
    spec: Mapping[str, Any],
    directions: Sequence[Literal["minimize", "maximize"]],
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner | None = None,
    queue: Sequence[Mapping[str, Any]],
    heartbeat: int = 60,
) -> Study:
    """Make a study with its queue of trials, or join it; in `{}` the sampler chooses all values.

    `storage` is the path of a journal file, or a server's URL, where a worker that has not been
    heard of for three times `heartbeat` seconds counts as dead. A longer queue than the study has
    is taken over. SrmuError where the study exists with another `spec`, or cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kept = open_storage(storage, heartbeat)
    with redact_errors(storage):
        try:
            optuna.create_study(storage=kept, study_name=name, directions=[*directions])
            made = True
        except DuplicatedStudyError:
            made = False
        study = Study(name, kept, sampler=sampler, pruner=pruner)
        study.place = storage
        if isinstance(storage, Path):
            study.workers = storage.with_name(f"{storage.name}.workers")
        known = None if made else wait_for(lambda: study.user_attrs.get("spec"))
        wanted = json.loads(json.dumps(spec))
        if known is None:  # new; or its maker died at once
            study.set_user_attr("spec", wanted)
        else:
            require_same(name, known, wanted)
        if len(queue) > len(study.user_attrs.get("queue", ())):
            study.set_user_attr("queue", [dict(params) for params in queue])
        if made:
            fill_queue(study)
    return study


def open_storage(storage: str | Path, heartbeat: int) -> optuna.storages.BaseStorage:
    """The journal or the server; SrmuError where it cannot be used."""
    if isinstance(storage, Path):
        if fcntl is None:
            raise SrmuError("a journal needs file locks, which Windows lacks: give --storage")
        storage.parent.mkdir(parents=True, exist_ok=True)
        # absolute, because its lock is a link to it
        journal = JournalFileBackend(str(storage.resolve()))
        try:
            return JournalStorage(journal)
        except (ValueError, KeyError, OSError) as error:
            raise SrmuError(f"{storage} is not a journal of Optuna: {first_line(error)}") from None
    url = parse_storage(storage)
    if url is None or url.get_backend_name() not in ("postgresql", "postgres"):
        raise SrmuError(
            f"storage {redact_storage(storage)}: expected "
            "postgresql://USER:PASSWORD@HOST:PORT/DATABASE; "
            "without one, a journal file in the output folder is used"
        )
    with redact_errors(storage), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for attempt in range(5):
            try:
                return RDBStorage(
                    # plain postgresql:// means another driver to SQLAlchemy
                    url.set(drivername="postgresql+psycopg").render_as_string(False),
                    {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10}},
                    heartbeat_interval=heartbeat,
                    grace_period=3 * heartbeat,
                    heartbeat_stale_trial_callback=again,
                )
            except ImportError:
                raise SrmuError("PostgreSQL needs a driver: pip install 'srmu[postgres]'") from None
            except (IntegrityError, ProgrammingError):  # two workers make the tables at once
                if attempt == 4:
                    raise
                time.sleep(POLL)
    raise AssertionError


@contextmanager
def redact_errors(storage: str | Path) -> Iterator[None]:
    """Make one line of what goes wrong with a storage, its password redacted."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        why = first_line(getattr(cause, "orig", None) or cause)
        place = f"storage {redact_storage(storage)}"
        raise SrmuError(f"{place} cannot be used: {hide_password(storage, why)}") from None


def redact_storage(storage: str | Path) -> str:
    """A storage as a person may see it: without its password and its options."""
    if isinstance(storage, Path):
        return str(storage)
    if url := parse_storage(storage):
        return url.set(query={}).render_as_string(hide_password=True)
    scheme, is_url, _ = storage.partition("://")
    return f"{scheme}://..." if is_url else repr(storage)


def hide_password(storage: str | Path, text: str) -> str:
    """A text without the password of a storage."""
    url = None if isinstance(storage, Path) else parse_storage(storage)
    for password in (url.password, url.query.get("password")) if url else ():
        text = text.replace(str(password), "***") if password else text
    return text


def parse_storage(storage: str) -> URL | None:
    """A storage as a URL, if it is one."""
    try:
        return make_url(storage)
    except (ArgumentError, ValueError):  # ValueError: of its port
        return None


def require_same(name: str, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """SrmuError where the study was made for something else: says what."""
    old, new = dict(dotted_leaves(known)), dict(dotted_leaves(wanted))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            was, now = (str(one.get(key, "nothing"))[:60] for one in (old, new))
            raise SrmuError(
                f"study {name!r} exists with another {key}: {was}, here {now}; "
                "give this one another name or another out folder"
            )


def dotted_leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """The values of a tree of mappings, by dotted keys."""
    if not isinstance(value, Mapping):
        return [(key.lstrip("."), value)]
    return [leaf for k, v in value.items() for leaf in dotted_leaves(v, f"{key}.{k}")]


def wait_for(value: Callable[[], Any], seconds: float = 10) -> Any:
    """What another worker is about to write; None where it does not come."""
    end = time.monotonic() + seconds
    while (found := value()) is None and time.monotonic() < end:
        time.sleep(POLL / 5)
    return found


def work_queue(
    study: Study, objective: Objective, watch: Watch, after: Callable[[], None] = lambda: None
) -> None:
    """Take trials off the queue until all are done, those of other workers included.

    A trial that raises Diverged is pruned, one that raises SrmuError has failed: `user_attrs` say
    why. SrmuError where the first ones all fail. Whatever else ends a trial, it is queued again.
    `after` is called when some have ended, here or at another worker.
    """
    failed = 0

    def attempt(trial: optuna.Trial) -> float | Sequence[float]:
        nonlocal failed
        if lock:
            trial.set_user_attr("worker", lock)
        if not is_needed(study, trial):
            trial.set_user_attr("surplus", True)
            raise Surplus
        try:
            return objective(trial)
        except DivergedError as error:
            trial.set_user_attr("why", near_words(error))
            raise optuna.TrialPruned from None
        except SrmuError as error:
            trial.set_user_attr("why", near_words(error))
            failed += 1
            raise

    with redact_errors(study.place), hold_worker_lock(study) as lock:
        now = standing_trials(study)
        if not any(map(is_answered, now)) and any(
            trial and trial.state == TrialState.FAIL for trial in now
        ):
            fill_queue(study)  # a mistake in what all have in common was mended
        left = sum(not is_over(trial) for trial in standing_trials(study))
        with watch("trials", left) as tick:
            while True:
                fail_dead(study, lock)
                now = standing_trials(study)
                before, left = left, sum(not is_over(trial) for trial in now)
                for _ in range(before - left):
                    tick(best_of(study))
                if left < before:
                    after()
                if not left:
                    return
                waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
                if waiting:
                    take_trial(study, attempt)
                    succeeded = any(is_answered(trial) for trial in standing_trials(study))
                    if failed >= min(3, len(now)) and not succeeded:
                        last = [t for t in standing_trials(study) if t and "why" in t.user_attrs]
                        raise SrmuError(f"no trial succeeds: {last[-1].user_attrs['why']}")
                elif any(t and t.state == TrialState.RUNNING for t in now):
                    time.sleep(POLL)
                else:
                    fill_queue(study)


def take_trial(study: Study, attempt: Objective) -> None:
    """Run the next trial of the queue."""
    try:
        study.optimize(attempt, n_trials=1, catch=(Surplus, SrmuError))
    except KeyboardInterrupt:
        fill_queue(study)
        raise
    except (UpdateFinishedTrialError, ValueError) as error:
        # This process was not heard of for so long that another one has the trial now.
        if not (isinstance(error, UpdateFinishedTrialError) or "Cannot tell" in str(error)):
            raise  # of the objective


def standing_trials(study: Study) -> list[FrozenTrial | None]:
    """For each point of the queue the trial that counts: the first that is not lost.

    Else the last one, or None where there is none yet.
    """
    found: list[FrozenTrial | None] = [None] * len(study.user_attrs["queue"])
    trials = study.get_trials(deepcopy=False)
    succeeded = any(is_answered(trial) for trial in trials)
    for trial in trials:
        point = trial.user_attrs.get("point")
        if point is None or "surplus" in trial.user_attrs:
            continue
        current = found[point]
        if (
            current is None
            or is_lost(current, succeeded)
            or trial.user_attrs.get("replaces") == current.number
        ):
            found[point] = trial
    return found


def is_lost(trial: FrozenTrial, succeeded: bool) -> bool:
    """Whether a trial ended without an answer, so that its point is to be done again.

    While none has succeeded, a mistake in what all have in common may be what made them fail.
    """
    return (
        trial.state == TrialState.FAIL
        and ("why" not in trial.user_attrs or not succeeded)
        and len(trial.system_attrs.get("retry_history", ())) < RETRIES
    )


def is_answered(trial: FrozenTrial | None) -> bool:
    return trial is not None and trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def is_over(trial: FrozenTrial | None) -> bool:
    """Whether a point needs no more work."""
    return trial is not None and trial.state.is_finished() and not is_lost(trial, True)


def is_needed(study: Study, trial: optuna.Trial) -> bool:
    """Whether it is for this trial to do its point."""
    point = trial.user_attrs.get("point")
    holder = None if point is None else standing_trials(study)[point]
    return holder is not None and holder.number == trial.number


def fill_queue(study: Study) -> None:
    """Queue the points that nobody has. Two workers may do so at once: see `needed`."""
    succeeded = any(is_answered(trial) for trial in standing_trials(study))
    for point, (params, trial) in enumerate(
        zip(study.user_attrs["queue"], standing_trials(study), strict=True)
    ):
        if trial is None or is_lost(trial, succeeded):
            old = {} if trial is None else {"replaces": trial.number}
            study.enqueue_trial(params, user_attrs={"point": point, **old})


def fail_dead(study: Study, lock: str) -> None:
    """Fail the running trials of workers that are dead, and queue them again."""
    if study.workers is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        return
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if not running:
        return
    alive = {path.name for path in study.workers.glob("[!.]*") if is_locked(path)}
    for trial in running:
        # one that was killed before it could sign its trial: who lives may be about to sign it
        worker = trial.user_attrs.get("worker") or next(iter(alive - {lock}), "")
        if worker in alive:
            continue
        dead = deepcopy(trial)
        dead.user_attrs.pop("worker", None)
        with suppress(ValueError, UpdateFinishedTrialError):  # another worker was faster
            study.tell(trial.number, state=TrialState.FAIL)
            again(study, dead)


@contextmanager
def hold_worker_lock(study: Study) -> Iterator[str]:
    """Hold the lock that says that this worker lives, while the block runs; its name."""
    if study.workers is None:
        yield ""
        return
    study.workers.mkdir(exist_ok=True)
    name = uuid4().hex
    unlocked, path = study.workers / f".{name}", study.workers / name
    with unlocked.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unlocked.rename(path)
        try:
            yield path.name
        finally:
            path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether the process that made a lock lives; the file of a dead one is removed."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def best_of(study: Study) -> str:
    """The best so far in a few words."""
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not complete:
        return "none is complete yet"
    if len(study.directions) > 1:
        return f"{len(study.best_trials)} of {len(complete)} on the front"
    return f"best {study.best_value:.4g} (trial {study.best_trial.number})"


def near_words(error: Exception) -> str:
    """An error's line, with files as they are named from here."""
    return str(error).replace(f"{Path.cwd()}/", "")
