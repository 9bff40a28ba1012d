"""The Optuna study in its database: it proposes candidates, remembers every outcome, and survives a kill."""

import hashlib
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compression.errors import CompressionError
from compression.search.samplers import Sampler, Situation
from compression.search.space import Choices, Genes
from compression.search.trials import Objective, TrialResult

logger = logging.getLogger(__name__)

STUDY_NAME = "search"
MOST_CANDIDATES_LISTED = 100_000
"""Spaces larger than this are sampled where smaller ones are gone through."""
FEW_CANDIDATES = 16
"""Spaces of so many are looked at from end to end before the sampler chooses."""
MOST_INTERRUPTIONS = 3
"""A trial during which the process ended so often has failed: it probably takes the process down with it."""
OPENINGS = 5
"""How often a shared database is tried that another worker is just setting up."""
HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120
"""A worker that gives no sign for so long is taken for dead, and its trial runs again."""


@dataclass(frozen=True)
class Proposal:
    """A candidate to build: trial ``number``, the space it comes from, and what was chosen there."""

    number: int
    space: str
    choices: Choices

    @property
    def key(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """Equal for proposals that ask for the same candidate."""
        return (self.space, tuple(sorted(self.choices.items())))


class Ledger:
    """Ask for a proposal, tell its outcome; both are in the database when the call returns.

    What is proposed is a function of the seed and the outcomes so far, so a study that was killed
    and goes on proposes what it would have proposed. Every proposal carries the choices of all spaces
    (those of the others lie idle), because NSGA-II recombines only choices that all trials have.
    """

    def __init__(
        self,
        storage: Path | str,
        spaces: Mapping[str, Genes],
        *,
        sampler: Sampler,
        objectives: Sequence[Objective],
        seed: int,
        fingerprint: str,
    ) -> None:
        """Opens or creates the study; use ``opened`` to have it locked and closed.

        ``storage`` is an SQLite file that one process holds, or the URL of a database that several share.

        Raises:
            CompressionError: the file holds a study of other spaces, data, parents or seed, or the database does not
                answer.
        """
        from optuna.exceptions import StorageInternalError as StorageError
        from sqlalchemy import URL
        from sqlalchemy.exc import IntegrityError, ProgrammingError

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._spaces = spaces
        self._sampler = sampler
        self._objectives = tuple(objectives)
        self._seed = seed
        self.shared = isinstance(storage, str)
        self._genome: dict[str, tuple[Any, ...]] = {"space": tuple(spaces)} | {
            f"{space}.{gene}": values for space, genes in spaces.items() for gene, values in genes.items()
        }
        if isinstance(storage, Path):
            storage.parent.mkdir(parents=True, exist_ok=True)
            url = URL.create("sqlite", database=str(storage.resolve())).render_as_string(hide_password=False)
            name, options = STUDY_NAME, {"connect_args": {"timeout": 60}}
        else:
            url, name, options = storage, f"{STUDY_NAME}-{fingerprint}", {"pool_pre_ping": True}
        for tries_left in reversed(range(OPENINGS)):
            try:
                with warnings_of_optuna():
                    self._storage, self._study = _opened_study(url, name, options, self._objectives, self.shared)
                break
            except Exception as error:
                if tries_left and self.shared and isinstance(error, IntegrityError | ProgrammingError | StorageError):
                    time.sleep(1.0)  # another worker is making the tables at this moment
                    continue
                where = f"'{storage}'" if isinstance(storage, Path) else "database of the setting study_storage"
                raise CompressionError(
                    f"Study {where} cannot be opened ({type(error).__name__}: {str(error).splitlines()[0]}), expected "
                    "a database this process may write. Check the file, or address, user and driver of the database."
                ) from error
        self._study_id = self._storage.get_study_id_from_name(name)
        known = self.note("fingerprint")
        if known not in (None, fingerprint):
            self.close()
            raise CompressionError(
                f"Study '{storage}' has trials of another search (fingerprint {known}), expected "
                f"{fingerprint}: its spaces, training, data, parents or seed changed. Give the new search a "
                "file of its own."
            )
        self.set_note("fingerprint", fingerprint)

    def note(self, name: str) -> Any:
        """What was remembered under ``name`` for the whole study; None when nothing was."""
        return self._study.user_attrs.get(name)

    def set_note(self, name: str, value: Any) -> None:
        """Remember a JSON value for the whole study."""
        self._study.set_user_attr(name, value)

    def enqueue(self, space: str, choices: Choices) -> None:
        """Propose this candidate after those enqueued before, unless it was enqueued or proposed already."""
        self._study.enqueue_trial(self._whole(space, choices), skip_if_exists=True)

    def _whole(self, space: str, choices: Choices) -> dict[str, Any]:
        """The choices of all spaces, the middle of each where nothing was chosen."""
        genome: dict[str, Any] = {
            f"{name}.{gene}": values[len(values) // 2]
            for name, genes in self._spaces.items()
            for gene, values in genes.items()
        }
        return {"space": space, **genome} | {f"{space}.{gene}": value for gene, value in choices.items()}

    def ask(self, situation: Callable[[int, int], Situation]) -> Proposal:
        """The next candidate: an interrupted one first, then those enqueued, then the sampler's choice.

        ``situation`` makes what a sampler may look at from the number and the seed of the proposal.
        """
        import optuna
        from optuna.trial import TrialState

        running = () if self.shared else self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        with warnings_of_optuna():
            if running:
                number = running[0].number
                logger.info("trial %d was interrupted and runs again", number)
                trial = optuna.Trial(self._study, self._id_of(number))
                trial.set_user_attr("interruptions", trial.user_attrs.get("interruptions", 0) + 1)
                self._study.sampler = self._sampler_for(number, situation)
            else:
                number = len(self._study.get_trials(deepcopy=False))
                self._study.sampler = self._sampler_for(number, situation)
                trial = self._study.ask()
            params: dict[str, Any] = {
                name: trial.suggest_categorical(name, values) for name, values in self._genome.items()
            }
        space = params["space"]
        return Proposal(trial.number, space, {gene: params[f"{space}.{gene}"] for gene in self._spaces[space]})

    def interruptions(self, number: int) -> int:
        """How often the process ended while this trial ran."""
        trial = self._study.get_trials(deepcopy=False)[number]
        retries = trial.system_attrs.get("retry_history", [])
        return trial.user_attrs.get("interruptions", 0) + len(retries)

    @contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Tells the other workers, while the block runs, that this trial is not abandoned."""
        if not self.shared:
            yield
            return
        done, trial_id = threading.Event(), self._id_of(number)

        def beat() -> None:
            while True:
                with suppress(Exception):  # a database that is away for a moment must not end the trial
                    self._storage.record_heartbeat(trial_id)
                if done.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def revive(self) -> None:
        """Queue the trials of workers that died again."""
        import optuna

        if self.shared:
            with warnings_of_optuna():
                optuna.storages.fail_stale_trials(self._study)

    def running_elsewhere(self) -> int:
        """How many trials other workers are at."""
        from optuna.trial import TrialState

        return len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def tell(self, row: TrialResult) -> None:
        """Record the outcome of the proposal with ``row.number``.

        Infeasible, filtered, stopped and duplicate candidates take no place in the sampler's population.
        """
        import optuna
        from optuna.trial import TrialState

        trial = optuna.Trial(self._study, self._id_of(row.number))
        record = {key: value for key, value in asdict(row).items() if key != "on_front"}
        record["checkpoint"] = None if row.checkpoint is None else row.checkpoint.name
        trial.set_user_attr("row", record)
        if row.excess is not None and "budget" not in trial.constraints:
            trial.set_constraint("budget", row.excess)
        if row.state == "complete":
            values = [float(getattr(row, name) or 0.0) for name in self._objectives]
            self._study.tell(row.number, values)
        else:
            self._study.tell(row.number, state=TrialState.FAIL if row.state == "failed" else TrialState.PRUNED)

    def rows(self, folder: Path) -> list[TrialResult]:
        """Every finished trial, by number; one whose checkpoint is gone from ``folder`` is a failure.

        In a shared study other workers hold checkpoints of their own; then it is left to who needs one to build it.
        """
        rows: list[TrialResult] = []
        for trial in self._study.get_trials(deepcopy=False):
            record = trial.user_attrs.get("row")
            if record is None or not trial.state.is_finished():
                continue
            fields: dict[str, Any] = dict(record) | {"curve": tuple(record.get("curve", ()))}
            if record["checkpoint"] is not None:
                place = folder / record["checkpoint"]
                fields["checkpoint"] = place
                if not self.shared and not (place / "spec.json").is_file():
                    fields |= {
                        "state": "failed",
                        "checkpoint": None,
                        "reason": f"its checkpoint '{place}' is gone",
                    }
            rows.append(TrialResult(**fields))
        return rows

    def unseen(self, rows: Sequence[TrialResult]) -> list[tuple[str, Choices]]:
        """Candidates that no row stands for, in the order of the spaces: all of them, or some where there are many."""
        seen = {Proposal(row.number, row.space, row.choices).key for row in rows}
        found: list[tuple[str, Choices]] = []
        for space, genes in self._spaces.items():
            if math.prod(len(values) for values in genes.values()) <= MOST_CANDIDATES_LISTED:
                listed = (dict(zip(genes, values, strict=True)) for values in itertools.product(*genes.values()))
            else:
                rng = random.Random(len(rows))
                listed = ({gene: rng.choice(values) for gene, values in genes.items()} for _ in range(64))
            found += [(space, choices) for choices in listed if Proposal(-1, space, choices).key not in seen]
        return found

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _sampler_for(self, number: int, situation: Callable[[int, int], Situation]) -> Any:
        """Optuna's sampler for one proposal; its random numbers depend on the study's seed and the number only."""
        import optuna

        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{number}".encode()).digest()[:4], "big")
        drawn = situation(number, seed)
        made = self._sampler.optuna(seed)
        if made is not None:
            return made
        return _scripted(lambda: self._whole(*self._sampler.propose(drawn)), optuna)


def _opened_study(
    url: str, name: str, options: Mapping[str, Any], objectives: Sequence[Objective], shared: bool
) -> tuple[Any, Any]:
    """Storage and study, made where they are not there yet."""
    import optuna

    storage = optuna.storages.RDBStorage(
        url,
        engine_kwargs=dict(options),
        heartbeat_interval=HEARTBEAT_SECONDS if shared else None,
        grace_period=GRACE_SECONDS if shared else None,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MOST_INTERRUPTIONS),
    )
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["maximize" if each == "accuracy" else "minimize" for each in objectives],
        load_if_exists=True,
    )
    return storage, study


def _scripted(params: Callable[[], dict[str, Any]], optuna: Any) -> Any:
    """A sampler that proposes what ``params`` says; asked once, and only when nothing is enqueued."""

    class Scripted(optuna.samplers.BaseSampler):
        chosen: dict[str, Any] | None = None

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            del study, trial
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            del study, trial, search_space
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            del study, trial, param_distribution
            if self.chosen is None:
                self.chosen = params()
            return self.chosen[param_name]

    return Scripted()


@contextmanager
def warnings_of_optuna() -> Iterator[None]:
    """Silence for the warnings that parts of Optuna are experimental."""
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)  # ``alive`` gives the sign of life
        yield


def first_trials(spaces: Mapping[str, Genes]) -> list[tuple[str, Choices]]:
    """The middle of every space, then the ends of those with a few candidates: smallest, then largest; each once.

    Small and large are by the listed values: the largest pruning ratio is the smallest network. The ends of a large
    space are far from any budget, so that they would tell nothing for a trial each.
    """
    picks: list[tuple[str, Choices]] = []
    for place in ("middle", "low", "high"):
        for space, genes in spaces.items():
            if place != "middle" and math.prod(len(values) for values in genes.values()) > FEW_CANDIDATES:
                continue
            index = {"middle": None, "low": 0, "high": -1}[place]
            choices = {gene: values[len(values) // 2 if index is None else index] for gene, values in genes.items()}
            if (space, choices) not in picks:
                picks.append((space, choices))
    return picks


def drawn(options: Sequence[tuple[str, Choices]], *, seed: int) -> tuple[str, Choices]:
    """One of the options, as a function of the seed."""
    return options[random.Random(seed).randrange(len(options))]


@contextmanager
def opened(storage: Path | str, spaces: Mapping[str, Genes], **settings: Any) -> Iterator[Ledger]:
    """A ledger; one in a file is held by this process alone while the block runs, and a killed process frees it.

    Raises:
        CompressionError: another process runs this study, or it belongs to another search.
    """
    if isinstance(storage, str):
        ledger = Ledger(storage, spaces, **settings)
        try:
            yield ledger
        finally:
            ledger.close()
        return
    from filelock import FileLock, Timeout

    storage.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(storage.with_name(storage.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CompressionError(
            f"Study '{storage}' has another process running it, expected none. Wait for it, or stop it first."
        ) from error
    try:
        ledger = Ledger(storage, spaces, **settings)
        try:
            yield ledger
        finally:
            ledger.close()
    finally:
        lock.release()
