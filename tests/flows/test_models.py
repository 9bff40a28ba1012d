"""``stillhouse models``, ``promote`` and ``rollback`` on a real registry; and policy files."""

import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from compression.errors import InputError, RecipeError
from export.gate import Policy
from export.promotion import Promotion
from flows.approvals import came_too_late
from flows.models import promote_model, rollback_model, show_models
from flows.recipe import load_recipe
from tasks import registry, tracking
from tasks.settings import settings
from tests.flows.registered import add_version

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    caches = (settings, tracking.client, tracking.experiment_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STILLHOUSE_ROOT", str(tmp_path_factory.mktemp("models")))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.usefixtures("registered")
class TestCommands:
    def test_promote_shows_the_comparison_and_rollback_goes_back(self, console: Console) -> None:
        add_version("parts")
        add_version("parts", accuracy=0.96, latency_ratio=[0.4, 0.39, 0.41])
        promote_model(console, "parts", version=1, yes=True)
        done = promote_model(console, "parts", yes=True, reason="faster and better")
        assert done is not None
        assert (done["version"], done["replaced"], done["reason"]) == (2, 1, "faster and better")
        shown = text(console)
        for part in ("96.00 %", "95.00 %", "+1.00, between +0.8", "0.800, between", "the policy would ask a person"):
            assert part.lower() in shown.lower(), shown
        rolled = rollback_model(console, "parts", reason="wrong on Mondays")
        assert (rolled["version"], rolled["rolled_back"]) == (1, 2)
        show_models(console, "parts")
        shown = text(console)
        assert "rolled back" in shown
        assert "wrong on Mondays" in shown
        assert "version 2 promoted by" in shown

    def test_the_champion_again_is_no_change(self, console: Console) -> None:
        add_version("calm")
        promote_model(console, "calm", yes=True)
        promote_model(console, "calm")
        assert "champion already" in text(console)
        assert len(registry.history("calm")) == 1

    def test_anomalies_need_yes_and_a_reason(self, console: Console) -> None:
        add_version("strange", accuracy=1.0)
        for given in ({}, {"yes": True}, {"reason": "easy"}, {"yes": True, "reason": " "}):
            with pytest.raises(InputError, match="has anomalies, expected a reason"):
                promote_model(console, "strange", **given)  # type: ignore[arg-type]
        assert registry.champion("strange") is None
        assert "right on all" in text(console)
        assert promote_model(console, "strange", yes=True, reason="easy images") is not None

    def test_without_a_terminal_somebody_must_have_said_yes(self, console: Console) -> None:
        add_version("quiet")
        with pytest.raises(InputError, match="nobody to ask here.*--yes"):
            promote_model(console, "quiet")
        assert registry.champion("quiet") is None

    def test_an_unknown_model_is_refused(self, console: Console) -> None:
        for act in (lambda: show_models(console, "nobody"), lambda: promote_model(console, "nobody", yes=True)):
            with pytest.raises(InputError, match="Model 'nobody' has no versions"):
                act()
        with pytest.raises(InputError, match="no champion"):
            rollback_model(console, "nobody")

    def test_every_model_is_listed(self, console: Console) -> None:
        add_version("listed", accuracy=0.1234)
        show_models(console)
        assert "listed" in text(console)
        assert "12.34 %" in text(console)


@pytest.mark.parametrize(("answered", "late"), [(1.9, False), (2.1, True)])
def test_an_answer_counts_when_it_was_given_not_when_a_worker_went_on(answered: float, late: bool) -> None:
    from prefect.states import Pending, Running, Scheduled, Suspended

    start = datetime(2026, 11, 26, tzinfo=UTC)
    hours = [(Running, -9.0), (Suspended, -8.0), (Scheduled, -7.9), (Suspended, 0.0), (Scheduled, answered)]
    history = [make(timestamp=start + timedelta(hours=at)) for make, at in [*hours, (Pending, 50.0), (Running, 50.1)]]
    assert came_too_late(history[::-1], 2.0) is late


def recipe(folder: Path, policy: str | None, **sections: Any) -> Path:
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text()) | sections
    raw["policy"] = policy
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_the_shipped_policy_file_says_the_defaults(tmp_path: Path) -> None:
    loaded = load_recipe(recipe(tmp_path, str(ROOT / "policies" / "default.yaml")))
    assert loaded.policy == Policy()
    assert loaded.promotion == Promotion()


def test_a_policy_file_lies_beside_its_recipe_and_overrides_reach_into_it(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "edge.yaml").write_text(
        "policy: {max_accuracy_drop: 0.02}\npromotion: {champion: never}\n"
    )
    path = recipe(tmp_path, "policies/edge.yaml")
    loaded = load_recipe(path, ["policy.max_size_kib=64", "promotion.approval_hours=2"])
    assert (loaded.policy.max_accuracy_drop, loaded.policy.max_size_kib) == (0.02, 64)
    assert loaded.promotion == Promotion(champion="never", approval_hours=2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("policy:\n  max_accuracy_drop: 2\n", "edge.yaml:2  policy.max_accuracy_drop: is 2"),
        ("policy: {}\npromotion:\n  champion: often\n", "edge.yaml:3  promotion.champion: is 'often'"),
        ("policy: {}\npromotion:\n  aproval_hours: 2\n", "edge.yaml:3  promotion.aproval_hours: unknown key"),
        ("policy: {}\npromotions: {}\n", "edge.yaml:2' has the section 'promotions'.*Did you mean 'promotion'"),
        ("promotion: {champion: never}\n", "edge.yaml  policy: is missing"),
        ("- policy\n", "edge.yaml' holds list"),
        ("policy: [\n", "edge.yaml' is not YAML"),
    ],
)
def test_errors_name_the_policy_file_and_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "edge.yaml").write_text(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe(tmp_path, "edge.yaml"))


def test_a_missing_policy_file_and_a_section_given_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml', named in '.*recipe.yaml:\d+', does not exist"):
        load_recipe(recipe(tmp_path, "none.yaml"))
    (tmp_path / "edge.yaml").write_text("policy: {}\npromotion: {}\n")
    with pytest.raises(RecipeError, match=r"'promotion' is in '.*recipe.yaml:\d+' and in .*edge.yaml:2'"):
        load_recipe(recipe(tmp_path, "edge.yaml", promotion={"champion": "never"}))
