"""The Optuna study on disk: it proposes candidates, remembers every outcome, and survives a kill."""

import hashlib
import itertools
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from compression.errors import CompressionError
from compression.search.trials import TrialResult

logger = logging.getLogger(__name__)

Genes = Mapping[str, tuple[float | int, ...]]
"""For one space: name of a choice -> its ascending values."""

OBJECTIVES = ("maximize", "minimize", "minimize")  # accuracy, latency_p50_ms, size_bytes
STUDY_NAME = "search"


@dataclass(frozen=True)
class Proposal:
    """A candidate to build: trial ``number``, the space it comes from, and what was chosen there."""

    number: int
    space: str
    choices: dict[str, float | int]

    @property
    def key(self) -> tuple[str, tuple[tuple[str, float | int], ...]]:
        """Equal for proposals that ask for the same candidate."""
        return (self.space, tuple(sorted(self.choices.items())))


class Ledger:
    """Ask for a proposal, tell its outcome; both are on disk when the call returns.

    What is proposed is a function of the seed and the outcomes so far, so a study that was killed
    and goes on proposes what it would have proposed. Every proposal carries the choices of all spaces
    (those of the others lie idle), because NSGA-II recombines only choices that all trials have.
    """

    def __init__(
        self,
        storage: Path,
        spaces: Mapping[str, Genes],
        *,
        sampler: Literal["nsga2", "tpe"],
        population: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        """Opens or creates the study; use ``opened`` to have it locked and closed.

        Raises:
            CompressionError: the file holds a study of other spaces, data, parents or seed.
        """
        import optuna
        from sqlalchemy import URL

        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._spaces = spaces
        self._sampler = sampler
        self._population = population
        self._seed = seed
        self._genome: dict[str, tuple[Any, ...]] = {"space": tuple(spaces)} | {
            f"{space}.{gene}": values for space, genes in spaces.items() for gene, values in genes.items()
        }
        storage.parent.mkdir(parents=True, exist_ok=True)
        url = URL.create("sqlite", database=str(storage.resolve()))
        self._storage = optuna.storages.RDBStorage(
            url.render_as_string(hide_password=False), engine_kwargs={"connect_args": {"timeout": 60}}
        )
        self._study = optuna.create_study(
            study_name=STUDY_NAME, storage=self._storage, directions=OBJECTIVES, load_if_exists=True
        )
        self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)
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

    def enqueue(self, space: str, choices: Mapping[str, float | int]) -> None:
        """Propose this candidate after those enqueued before, unless it was enqueued or proposed already."""
        genome: dict[str, Any] = {
            f"{name}.{gene}": values[len(values) // 2]
            for name, genes in self._spaces.items()
            for gene, values in genes.items()
        }
        genome |= {f"{space}.{gene}": value for gene, value in choices.items()}
        self._study.enqueue_trial({"space": space, **genome}, skip_if_exists=True)

    def ask(self) -> Proposal:
        """The next candidate: an interrupted one first, then those enqueued, then the sampler's choice."""
        import optuna
        from optuna.trial import TrialState

        interrupted = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if interrupted:
            number = interrupted[0].number
            logger.info("trial %d was interrupted and runs again", number)
            self._study.sampler = self._fresh_sampler(number)
            trial = optuna.Trial(self._study, self._id_of(number))
        else:
            self._study.sampler = self._fresh_sampler(len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask()
        params: dict[str, Any] = {
            name: trial.suggest_categorical(name, values) for name, values in self._genome.items()
        }
        space = params["space"]
        return Proposal(trial.number, space, {gene: params[f"{space}.{gene}"] for gene in self._spaces[space]})

    def tell(self, row: TrialResult, *, excess: float | None = None) -> None:
        """Record the outcome of the proposal with ``row.number``.

        ``excess`` is by what share an infeasible candidate exceeds its budget. Infeasible and duplicate
        candidates take no place in the sampler's population.
        """
        import optuna
        from optuna.trial import TrialState

        trial = optuna.Trial(self._study, self._id_of(row.number))
        record = {key: value for key, value in asdict(row).items() if key != "on_front"}
        record["checkpoint"] = None if row.checkpoint is None else row.checkpoint.name
        trial.set_user_attr("row", record)
        if excess is not None and "budget" not in trial.constraints:
            trial.set_constraint("budget", excess)
        if row.state == "complete":
            values = [row.accuracy, row.latency_p50_ms, float(row.size_bytes or 0)]
            self._study.tell(row.number, [float(value or 0.0) for value in values])
        else:
            self._study.tell(row.number, state=TrialState.FAIL if row.state == "failed" else TrialState.PRUNED)

    def rows(self, folder: Path) -> list[TrialResult]:
        """Every finished trial, by number; one whose checkpoint is gone from ``folder`` is a failure."""
        rows: list[TrialResult] = []
        for trial in self._study.get_trials(deepcopy=False):
            record = trial.user_attrs.get("row")
            if record is None or not trial.state.is_finished():
                continue
            fields: dict[str, Any] = dict(record)
            if record["checkpoint"] is not None:
                place = folder / record["checkpoint"]
                fields["checkpoint"] = place
                if not (place / "spec.json").is_file():
                    fields |= {
                        "state": "failed",
                        "checkpoint": None,
                        "reason": f"its checkpoint '{place}' is gone",
                    }
            rows.append(TrialResult(**fields))
        return rows

    def unseen(self, rows: Sequence[TrialResult]) -> list[tuple[str, dict[str, float | int]]]:
        """Every candidate of every space that no row stands for, in the order of the spaces."""
        seen = {Proposal(row.number, row.space, row.choices).key for row in rows}
        everything = (
            Proposal(-1, space, dict(zip(genes, values, strict=True)))
            for space, genes in self._spaces.items()
            for values in itertools.product(*genes.values())
        )
        return [(one.space, one.choices) for one in everything if one.key not in seen]

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _fresh_sampler(self, number: int) -> Any:
        """A sampler whose random numbers depend on the study's seed and the trial's number only."""
        import optuna

        seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{number}".encode()).digest()[:4], "big")
        if self._sampler == "tpe":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._population, multivariate=True)
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=self._population)


def first_trials(spaces: Mapping[str, Genes]) -> list[tuple[str, dict[str, float | int]]]:
    """The middle of every space, then the smallest of every space, then the largest; each once.

    Small and large are by the listed values: the largest pruning ratio is the smallest network.
    """
    picks: list[tuple[str, dict[str, float | int]]] = []
    for place in ("middle", "low", "high"):
        for space, genes in spaces.items():
            index = {"middle": None, "low": 0, "high": -1}[place]
            choices = {gene: values[len(values) // 2 if index is None else index] for gene, values in genes.items()}
            if (space, choices) not in picks:
                picks.append((space, choices))
    return picks


def drawn(options: Sequence[tuple[str, dict[str, float | int]]], *, seed: int) -> tuple[str, dict[str, float | int]]:
    """One of the options, as a function of the seed."""
    return options[random.Random(seed).randrange(len(options))]


@contextmanager
def opened(storage: Path, spaces: Mapping[str, Genes], **settings: Any) -> Iterator[Ledger]:
    """A ledger that this process alone holds while the block runs; a killed process frees it.

    Raises:
        CompressionError: another process runs this study, or it belongs to another search.
    """
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
