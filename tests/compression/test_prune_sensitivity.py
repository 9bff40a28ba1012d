"""Pruning that starts from a sensitivity table: which ratios a study proposes first, and that nothing else changes."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import CompressionError
from compression.quantize.sensitivity import Format, LayerSensitivity, Sensitivity
from compression.search import Prune
from compression.search.allocation import allocations, stage_costs
from compression.search.space import Workshop
from compression.zoo import VisionTransformer
from tests.compression.test_prune_space import teacher_of as parent_of
from tests.compression.test_study import Trainer, config_of, dataset_of, outline, search, teacher_of
from tests.compression.tiny_data import tiny_dataset

RATIOS = (0.0, 0.25, 0.5, 0.75)
LABEL = "prune-teacher-magnitude-stages"
SPACE = Prune(parent="teacher", stage_ratios=RATIOS, use_sensitivity=True)


def table_of(column: Format = "half the channels", **kl: float) -> Sensitivity:
    """Rows with this KL for layers in which dots are written as two underscores."""
    rows = (
        LayerSensitivity(layer=layer.replace("__", "."), format=column, kl=each, flips=0.0, accuracy_drop=0.0)
        for layer, each in kl.items()
    )
    return Sensitivity(rows=tuple(rows), num_samples=8, accuracy=0.9)


FINE_STAGES_BEAR_LESS = table_of(stem__0=3.0, blocks__0__0=1.0, blocks__1__0=0.5)  # each layer is a stage
COARSE_STAGES_BEAR_LESS = table_of(stem__0=0.1, blocks__0__0=0.3, blocks__1__0=0.5)


def shop_of(folder: Path, **changes) -> Workshop:
    return Workshop(
        **({"parents": {"teacher": teacher_of()}, "dataset": dataset_of(), "seed": 0, "folder": folder} | changes)
    )


def first_of(table: Sensitivity, tmp_path: Path) -> list[tuple[float, ...]]:
    found = SPACE.first_choices(shop_of(tmp_path, sensitivity={"teacher": table}))
    assert all(list(choices) == ["ratio_0", "ratio_1", "ratio_2"] for choices in found)
    return [tuple(choices.values()) for choices in found]


# --- the arithmetic


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=6),
    st.lists(st.floats(0, 0.9), min_size=2, max_size=6, unique=True).map(sorted),
)
def test_who_costs_more_never_loses_more(costs, ratios):
    found = allocations(costs, ratios)
    assert 1 <= len(found) <= 3
    for allocation in found:
        assert set(allocation) <= set(ratios)
        by_cost = sorted(zip(costs, allocation, strict=True))
        assert all(left[1] >= right[1] for left, right in pairwise(by_cost) if left[0] < right[0])
        assert all(left[1] == right[1] for left, right in pairwise(by_cost) if left[0] == right[0])


def test_the_first_guess_spans_all_ratios_and_the_others_their_halves():
    assert allocations([2.0, 9.0, 1.0], [0.1, 0.3, 0.5, 0.7, 0.9]) == [
        (0.5, 0.1, 0.9),
        (0.3, 0.1, 0.5),
        (0.7, 0.5, 0.9),
    ]
    assert allocations([1.0, 2.0], [0.25, 0.5]) == [(0.5, 0.25), (0.25, 0.25), (0.5, 0.5)]
    assert allocations([1.0], RATIOS) == allocations([1.0, 2.0], [0.5]) == []


def test_a_stage_costs_the_mean_of_its_layers_and_a_block_has_all_that_are_in_it():
    table = table_of(a=1.0, a2=100.0, b__qkv=2.0, b__proj=4.0)
    assert stage_costs([("a",), ("a", "b")], table, "t") == [1.0, pytest.approx(7 / 3)]
    with pytest.raises(CompressionError, match=r"table of 't' has no row 'half the channels' for .* stage 0 \(c\)"):
        stage_costs([("c",)], table, "t")
    with pytest.raises(CompressionError, match="Add the format to the sensitivity stage"):
        stage_costs([("a",)], table_of("int8", a=1.0), "t")


# --- the space


def test_the_less_sensitive_stage_gets_the_higher_ratio(tmp_path):
    assert first_of(FINE_STAGES_BEAR_LESS, tmp_path) == [(0.0, 0.5, 0.75), (0.0, 0.0, 0.25), (0.5, 0.5, 0.75)]
    assert first_of(COARSE_STAGES_BEAR_LESS, tmp_path) == [(0.75, 0.5, 0.0), (0.25, 0.0, 0.0), (0.75, 0.5, 0.5)]


def test_heads_count_every_layer_of_their_attention(tmp_path):
    data = tiny_dataset()
    tokens = VisionTransformer(width=32, depth=1, num_heads=4, stem="patch", patch_size=2)
    table = table_of(blocks__0__attn__qkv=9.0, blocks__0__attn__proj=1.0, blocks__0__mlp__0=4.0, blocks__0__mlp__2=2.0)
    shop = shop_of(tmp_path, parents={"teacher": parent_of(tokens, data)}, dataset=data, sensitivity={"teacher": table})
    heads, mlp, embedding = SPACE.first_choices(shop)[0].values()
    assert heads < mlp < embedding  # 5 (the mean of two), 4, 2


def test_without_the_option_or_with_one_ratio_for_all_nothing_is_asked_for(tmp_path):
    plain = shop_of(tmp_path)
    for space in (Prune(parent="teacher", stage_ratios=RATIOS), Prune(parent="teacher", use_sensitivity=True)):
        assert not space.wants_sensitivity
        assert space.first_choices(plain) == []
    assert Prune(parent="teacher", use_sensitivity=True).genes(plain) == Prune(parent="teacher").genes(plain)


def test_the_option_changes_no_candidate(tmp_path):
    shop = shop_of(tmp_path, sensitivity={"teacher": FINE_STAGES_BEAR_LESS})
    choices = SPACE.first_choices(shop)[0]
    with_table, _ = SPACE.build(choices, shop)
    without, _ = SPACE.model_copy(update={"use_sensitivity": False}).build(choices, shop)
    left, right = with_table.state_dict(), without.state_dict()
    assert all(left[name].equal(right[name]) for name in right)


def test_a_missing_table_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(CompressionError, match=r"no sensitivity table of 'teacher', expected one \(tables: other\)"):
        SPACE.genes(shop_of(tmp_path, sensitivity={"other": FINE_STAGES_BEAR_LESS}))
    trainer = Trainer()
    with pytest.raises(CompressionError, match="Turn the sensitivity stage on"):
        search(tmp_path, config_of(spaces=(SPACE,), trials=2), train=trainer)
    assert trainer.calls == []


# --- the study


def test_a_study_proposes_them_first_and_the_same_after_a_break(tmp_path):
    config = config_of(spaces=(SPACE,), trials=4)
    assert config.wants_sensitivity == ("teacher",)
    tables = {"teacher": FINE_STAGES_BEAR_LESS}
    whole = search(tmp_path / "whole", config, sensitivity=tables)
    guesses = SPACE.first_choices(shop_of(tmp_path, sensitivity=tables))
    middle = dict.fromkeys(guesses[0], 0.5)  # what comes first without a table
    assert [trial.choices for trial in whole.trials[:4]] == [*guesses, middle]

    class Killed(BaseException):
        pass

    class Killing(Trainer):
        def __call__(self, model, number, folder, on_epoch):
            if len(self.calls) == 2:
                raise Killed
            return super().__call__(model, number, folder, on_epoch)

    with pytest.raises(Killed):
        search(tmp_path / "broken", config, sensitivity=tables, train=Killing())
    assert outline(search(tmp_path / "broken", config, sensitivity=tables)) == outline(whole)


def test_another_table_is_another_study_where_a_space_reads_it(tmp_path):
    config = config_of(spaces=(SPACE,), trials=1)
    search(tmp_path, config, sensitivity={"teacher": FINE_STAGES_BEAR_LESS})
    with pytest.raises(CompressionError, match="trials of another search"):
        search(tmp_path, config, sensitivity={"teacher": COARSE_STAGES_BEAR_LESS})


def test_a_table_nobody_reads_changes_nothing(tmp_path):
    config = config_of(trials=2)
    assert config.wants_sensitivity == ()
    left = search(tmp_path / "left", config)
    right = search(tmp_path / "right", config, sensitivity={"teacher": FINE_STAGES_BEAR_LESS})
    assert left.fingerprint == right.fingerprint
    assert outline(left) == outline(right)
