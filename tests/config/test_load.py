"""From a recipe and overrides to a configuration and back, and what is said of a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi1_megatron.config.load import load_recipe, parse_config, to_toml
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.errors import RecipeError

RECIPE = """
[parallel]
pipeline_model_parallel_size = 2
virtual_pipeline_model_parallel_size = 2
[data]
blend = ["data/a", "data/b"]
tokenizer = "data/tokenizer"
[scheduler]
warmup_steps = 10
[training]
train_steps = 100
global_batch_size = 8
micro_batch_size = 2
recompute = "full"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_a_recipe_is_laid_over_the_defaults(recipe: Path) -> None:
    config = load_recipe(recipe)
    assert config.training.train_steps == 100
    assert [part.prefix for part in config.data.blend] == ["data/a", "data/b"]
    assert config.optimizer.adam_eps == 1e-7  # not in the recipe: the schema's


def test_overrides_win_over_the_recipe_and_the_last_one_over_the_first(recipe: Path) -> None:
    config = load_recipe(recipe, ["training.train_steps=50", "training.train_steps = 60"])
    assert config.training.train_steps == 60
    assert config.training.global_batch_size == 8


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("training.precision=bf16", "training", "precision", "bf16"),
        ('training.precision="bf16"', "training", "precision", "bf16"),
        ("logging.tensorboard=false", "logging", "tensorboard", False),
        ("data.split=[90, 10, 0]", "data", "split", [90.0, 10.0, 0.0]),
        ("data.tokenizer=runs/my=tokenizer", "data", "tokenizer", "runs/my=tokenizer"),
        ("checkpoint.save_interval=7", "checkpoint", "save_interval", 7),  # no such section in it
    ],
)
def test_an_override_takes_toml_values_and_bare_words(
    recipe: Path, override: str, section: str, field: str, value: object
) -> None:
    found = getattr(getattr(load_recipe(recipe, [override]), section), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "dotted", ["parallel.virtual_pipeline_model_parallel_size", "data.tokenizer"]
)
def test_none_unsets_a_field_that_may_be_unset(recipe: Path, dotted: str) -> None:
    section, field = dotted.split(".")
    assert getattr(getattr(load_recipe(recipe), section), field) is not None
    assert getattr(getattr(load_recipe(recipe, [f"{dotted}=none"]), section), field) is None


def test_none_is_a_word_where_the_field_has_such_a_choice(recipe: Path) -> None:
    assert load_recipe(recipe).training.recompute == "full"
    assert load_recipe(recipe, ["training.recompute=none"]).training.recompute == "none"


def test_none_where_a_number_is_needed_is_refused_and_not_taken_for_the_default(
    recipe: Path,
) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.lr = 'none'"):
        load_recipe(recipe, ["optimizer.lr=none"])


@pytest.mark.parametrize("override", ["train_steps=3", "training.train_steps", "a.b.c=1", ".x=1"])
def test_an_override_of_another_form_is_refused_with_an_example(
    recipe: Path, override: str
) -> None:
    with pytest.raises(RecipeError, match=r"section\.field=value.*training\.train_steps=100"):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layer=3", "there is no model.num_layer; did you mean model.num_layers?"),
        ("training.lr=1.0", "there is no training.lr; did you mean optimizer.lr?"),
        ("trainning.seed=1", "there is no trainning; did you mean training?"),
        ("logging.zzzzz=1", "there is no logging.zzzzz; known here: log_interval, tensorboard"),
        (
            'data.blend=[{prefix = "a", wieght = 2.0}]',
            "there is no data.blend.wieght; did you mean data.blend.weight?",
        ),
        ('training.train_steps="many"', "training.train_steps = 'many': input should be a valid"),
        ("training.train_steps=1e3", "training.train_steps = 1000.0: input should be a valid int"),
        ("training.train_steps=true", "training.train_steps = True: input should be a valid int"),
        ("training.train_steps=0", "training.train_steps = 0: input should be greater than"),
        ("optimizer.lr=nan", "optimizer.lr = nan: input should be a finite number"),
        ("optimizer.lr=inf", "optimizer.lr = inf: input should be a finite number"),
        ("training.precision=fp8", "training.precision = 'fp8': input should be 'fp32', 'bf16'"),
    ],
)
def test_a_mistake_is_named_by_its_dotted_path_with_the_nearest_name(
    recipe: Path, override: str, said: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, [override])
    assert f"{recipe}: {said}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_mistake_is_told_at_once_each_on_its_line(recipe: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, ["model.num_layer=3", "training.seed=-1"])
    first, second = str(refused.value).splitlines()
    assert "num_layer" in first
    assert "training.seed = -1" in second


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RecipeError, match=r"here: training\.train_steps is missing"):
        parse_config(
            {"data": {"blend": ["a"]}, "training": {"global_batch_size": 1, "micro_batch_size": 1}},
            source="here",
        )


def test_a_missing_recipe_names_its_neighbour_of_nearly_the_same_name(recipe: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe.with_name("recip.toml"))
    assert f"did you mean {recipe}?" in str(refused.value)


def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[model]\nnum_layers: 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.toml is not valid TOML: .*line 2"):
        load_recipe(path)


@pytest.mark.parametrize("bytes_or_folder", [b"\xff\xfe\x00", None])
def test_what_cannot_be_read_at_all_is_a_recipe_error(
    tmp_path: Path, bytes_or_folder: bytes | None
) -> None:
    path = tmp_path / "odd.toml"
    if bytes_or_folder is None:
        path.mkdir()
    else:
        path.write_bytes(bytes_or_folder)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_a_recipe_that_has_a_value_where_a_section_belongs_refuses_overrides_of_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "flat.toml"
    path.write_text("model = 3\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="'model', not a section"):
        load_recipe(path, ["model.num_layers=2"])


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
shares = st.floats(min_value=1e-12, max_value=1e12)
parts = st.fixed_dictionaries({"prefix": names, "weight": shares})
trees = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "num_layers": st.integers(1, 99),
                "layernorm_epsilon": shares,
                "hidden_dropout": st.floats(0.0, 0.99),
            }
        ),
        "parallel": st.sampled_from(
            [
                {},
                {"tensor_model_parallel_size": 2, "sequence_parallel": True},
                {
                    "pipeline_model_parallel_size": 3,
                    "virtual_pipeline_model_parallel_size": 2,
                },
            ]
        ),
        "data": st.fixed_dictionaries(
            {
                "blend": st.lists(names | parts, min_size=1, max_size=3),
                "tokenizer": st.none() | names,
                "validation_blend": st.none() | st.lists(parts, min_size=1, max_size=2),
                "split": st.tuples(shares, shares, shares).map(list),
            }
        ),
        "optimizer": st.fixed_dictionaries({"lr": shares, "adam_beta1": st.floats(0.0, 0.999)}),
        "scheduler": st.fixed_dictionaries(
            {"warmup_steps": st.just(0), "decay_steps": st.none() | st.integers(1, 10**9)}
        ),
        "training": st.fixed_dictionaries(
            {
                "train_steps": st.integers(1, 10**9),
                "global_batch_size": st.integers(1, 10**6),
                "micro_batch_size": st.integers(1, 64),
                "recompute": st.sampled_from(["none", "selective", "full"]),
            }
        ),
        "logging": st.fixed_dictionaries({"tensorboard": st.booleans()}),
    }
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=trees)
def test_a_configuration_written_as_toml_reads_back_as_the_same(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    config = RunConfig.model_validate(tree)
    path = tmp_path / "written.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_recipe(path) == config
