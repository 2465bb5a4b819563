"""What ``--dry-run`` says of a run, and that its sums are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phi1_megatron.config.load import load_recipe
from phi1_megatron.errors import LayoutError
from phi1_megatron.planning.dry_run import describe_run

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def describe(capsys: pytest.CaptureFixture[str]):
    """What is printed of a recipe with overrides, label → its lines."""

    def call(name: str, *overrides: str, ranks: int | None = None, newest: Path | None = None):
        recipe = RECIPES / f"{name}.toml"
        describe_run(load_recipe(recipe, overrides), recipe, Path("runs/x"), ranks, newest)
        printed = capsys.readouterr().out
        said: dict[str, list[str]] = {}
        for line in printed.splitlines():
            label, text = line[:13].strip(), line[13:].strip()
            said.setdefault(label or list(said)[-1], []).append(text)
        return said

    return call


def numbers_in(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_the_parts_of_the_model_add_up_to_its_total(describe) -> None:
    total, *parts = describe("phi1")["parameters"]
    assert total == "1,418,270,720"
    assert sum(numbers_in(part)[0] for part in parts) == 1_418_270_720


def test_phi_1_on_its_eight_gpus(describe) -> None:
    said = describe("phi1", ranks=8)
    assert said["layout"] == ["TP1 x PP1 x DP8 = 8 ranks"]
    assert said["batch"] == ["1,024 samples = 4 micro x 8 data-parallel x 32 accumulated"]
    assert said["tokens"] == [
        "2,097,152 a step (1,024 x 2,048)",
        "75,497,472,000 in 36,000 steps",
    ]
    assert said["rate"] == ["0 to 0.001 over 750 steps, linear to 0 at step 36,000"]
    assert said["a rank"] == [
        "at most 1,418,270,720 parameters",
        "AdamW's state is split over the 8 data-parallel ranks",
    ]


def test_a_batch_is_the_product_of_its_parts(describe) -> None:
    for ranks in (4, 8, 32):
        (line,) = describe("phi1_tp2_pp2", ranks=ranks)["batch"]
        whole, micro, data, accumulated = numbers_in(line)
        assert whole == micro * data * accumulated == 1024
        assert data == ranks // 4


def test_the_fullest_rank_is_named_with_its_stage(describe) -> None:
    said = describe("phi1_tp2_pp2", ranks=32)
    assert said["a stage"] == ["12 of 24 layers, in 2 chunks"]
    # the second stage: its half of the layers' 2-way split, final LayerNorm, half the output layer
    assert said["a rank"][0] == "at most 354,632,704 parameters (stage 1 of 0 to 1)"


def test_without_a_number_of_ranks_one_copy_is_assumed_and_said_so(describe) -> None:
    assert describe("phi1_tp2_pp2")["layout"] == [
        "TP2 + SP x PP2 (x2 virtual) x DP1 = 4 ranks",
        "for 4 ranks; --num-processes says how many you will have",
    ]


def test_on_a_cpu_one_copy_is_what_would_start_so_nothing_is_assumed(describe) -> None:
    assert describe("phi1_tiny_cpu")["layout"] == ["TP2 + SP x PP1 x DP1 = 2 ranks"]


def test_operations_come_with_their_formula_and_its_numbers(describe) -> None:
    formula, numbers, total = describe("phi1")["operations"]
    assert formula == "9,088,438,272 FLOPs a token = 6 N + 12 L h s"
    assert numbers == "N 1,313,413,120 without the embedding, L 24, h 2,048, s 2,048"
    assert total == "6.86e+20 FLOPs in all"  # 9.088e9 x 75.5e9


def test_a_blend_s_shares_and_tokens_are_those_of_its_weights(describe) -> None:
    said = describe("phi1")["data"]
    assert said[:2] == [
        "data/stack_python_filtered_text_document",
        "57.9%, 43.7B tokens; .bin and .idx not there",  # 5.363 of 9.257, of 75.5B
    ]
    shares = [float(line.split("%")[0]) for line in said[1:8:2]]
    assert sum(shares) == pytest.approx(100.0, abs=0.2)
    assert said[-1] == "phi1 preprocess makes what is not there"


def test_data_that_is_there_is_said_to_be(describe) -> None:
    Path("a.bin").touch()
    Path("a.idx").touch()
    Path("b.bin").touch()
    said = describe("phi1_tiny_cpu", 'data.blend=["a", "b"]')["data"]
    assert said[:4] == [
        "a",
        "50.0%, 512k tokens; there",
        "b",
        "50.0%, 512k tokens; .idx not there",
    ]
    assert describe("phi1_tiny_cpu", 'data.blend=["a"]')["data"][-1].endswith("; there")


def test_validation_data_of_its_own_is_shown_too(describe) -> None:
    said = describe("phi1_tiny_cpu", 'data.validation_blend=["held_out"]')["data"]
    assert "held_out" in said
    assert "validation; .bin and .idx not there" in said


def test_the_run_folder_says_where_it_would_begin(describe) -> None:
    fresh = describe("phi1_tiny_cpu")["run folder"]
    assert fresh == ["runs/x", "starts at step 0: there is no whole checkpoint in it"]
    found = describe("phi1_tiny_cpu", newest=Path("runs/x/checkpoints/step_00000100"))
    assert found["run folder"] == ["runs/x", "goes on from step_00000100"]


def test_a_finetune_says_whose_weights_it_starts_with_and_whether_they_are_there(describe) -> None:
    words = " ".join(describe("phi1_finetune")["run folder"])
    assert "with the weights of runs/phi1/checkpoints/step_00024000, which is not there" in words
    Path("runs/phi1/checkpoints/step_00024000").mkdir(parents=True)
    words = " ".join(describe("phi1_finetune")["run folder"])
    assert words.endswith("with the weights of runs/phi1/checkpoints/step_00024000")


def test_a_schedule_without_decay_validation_or_saves_says_so(describe) -> None:
    said = describe(
        "phi1_tiny_cpu",
        "scheduler.decay_style=constant",
        "training.eval_interval=0",
        "checkpoint.save_interval=0",
    )
    assert said["rate"] == ["0 to 0.003 over 20 steps, then constant"]
    assert said["validation"] == ["never"]
    assert said["checkpoints"] == ["at the end; the newest 2 kept"]


def test_a_layout_that_does_not_divide_is_refused_before_anything_is_printed(
    describe, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LayoutError, match="6 ranks do not divide into copies"):
        describe("phi1_tp2_pp2", ranks=6)
    assert capsys.readouterr().out == ""


def test_brackets_in_a_path_are_printed_and_not_taken_for_a_colour(describe) -> None:
    assert "data/[red]x" in describe("phi1_tiny_cpu", 'data.blend=["data/[red]x"]')["data"]
