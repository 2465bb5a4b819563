"""Generation against plain, unbatched, uncached transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phi1_megatron.checkpoint.convert import export_huggingface
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import CheckpointError, UsageError
from phi1_megatron.inference.generation import Generator, _Sampling

PROMPTS = [
    "def add(a, b):\n",
    "x",
    "",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop",
    "import os\n\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generation")
    text = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    items = []\n"
    tokenizer = train_bpe([text] * 4, vocab_size=310)
    tokenizer.save(place / "tokenizer")
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=310,
        make_vocab_size_divisible_by=512,  # most rows are padding, and must never be chosen
        max_position_embeddings=96,
    )
    generator = torch.Generator().manual_seed(11)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.3 + name.endswith("norm.weight")
        for name, shape in expected_shapes(model).items()
    }
    bias = weights["output_layer.bias"]
    for token in range(310):  # mostly readable text, so that decoding is one token, some letters
        if not tokenizer.decode([token]).isascii():
            bias[token] -= 20.0
    bias[tokenizer.eod_id] -= 20.0
    bias[400] += 1000.0  # a row of padding that wants to be chosen
    export_huggingface(weights.__getitem__, model, place / "model", tokenizer=place / "tokenizer")
    return place / "model"


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator(folder, device="cpu")


def greedy_by_hand(folder: Path, generator: Generator, prompt: str, num: int) -> str:
    """One prompt at a time, no padding, no cache: the plainest greedy decoding there is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = generator.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    start = len(ids)
    with torch.no_grad():
        for _ in range(num):
            scores = model(torch.tensor([ids])).logits[0, -1, : tokenizer.vocab_size]
            ids = [*ids, int(scores.argmax())]
            if ids[-1] == tokenizer.eod_id:
                return tokenizer.decode(ids[start:-1])
    return tokenizer.decode(ids[start:])


def test_greedy_text_is_the_same_at_every_batch_size_and_place(
    folder: Path, generator: Generator
) -> None:
    wanted = [greedy_by_hand(folder, generator, prompt, 20) for prompt in PROMPTS]
    assert len(set(wanted)) == len(wanted)  # the prompts matter, so a mixed-up order would show
    for batch_size in (1, 2, 3, 5, 8):
        for turn in (1, -1):
            completions = generator.complete(
                PROMPTS[::turn], max_new_tokens=20, batch_size=batch_size
            )
            assert [c.text for (c,) in completions] == wanted[::turn]


def test_samples_depend_on_seed_prompt_and_sample_alone(generator: Generator) -> None:
    def sample(batch_size: int, seed: int) -> list[list[str]]:
        completions = generator.complete(
            PROMPTS,
            max_new_tokens=12,
            temperature=0.8,
            top_p=0.95,
            num_samples=3,
            seed=seed,
            batch_size=batch_size,
        )
        return [[completion.text for completion in group] for group in completions]

    torch.manual_seed(5)
    first = sample(1, seed=1)
    torch.manual_seed(6)  # the global generator plays no part
    assert sample(4, seed=1) == first
    assert sample(15, seed=1) == first
    assert sample(15, seed=2) != first
    assert all(len(set(group)) > 1 for group in first)


def test_a_prompt_given_twice_gets_two_samples(generator: Generator) -> None:
    (first,), (second,) = generator.complete(["def"] * 2, max_new_tokens=12, temperature=1.0)
    assert first.text != second.text


def test_sampling_follows_the_models_probabilities_within_top_p() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1])
    rows, draws = 50, 400
    sampling = _Sampling(range(rows), 0, draws, temperature=1.0, top_p=0.75)
    counts = torch.zeros(5)
    for step in range(draws):
        scores = probabilities.log().expand(rows, 5)
        chosen = sampling(torch.zeros(rows, step), scores).argmax(dim=-1)
        counts += torch.bincount(chosen, minlength=5)
    # 0.5 alone does not reach 0.75, 0.5 + 0.3 does: two tokens are left, 5 to 3.
    assert counts[[0, 2, 4]].sum() == 0
    assert counts[1] / counts.sum() == pytest.approx(0.625, abs=0.02)


def test_a_low_temperature_comes_down_to_greedy(generator: Generator) -> None:
    greedy = generator.complete(PROMPTS, max_new_tokens=12)
    cold = generator.complete(PROMPTS, max_new_tokens=12, temperature=1e-4)
    assert [c.text for (c,) in cold] == [c.text for (c,) in greedy]


def test_a_stop_string_cuts_the_text_even_inside_a_token(generator: Generator) -> None:
    (whole,) = generator.complete(["def add"], max_new_tokens=30)[0]
    assert whole.finish_reason == "length"
    assert whole.num_tokens == 30
    middle = len(whole.text) // 2
    # Two characters across a border of tokens, somewhere in the text; the earliest place counts.
    stop = whole.text[middle : middle + 3]
    (cut,) = generator.complete(["def add"], max_new_tokens=30, stop=["never there", stop])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.num_tokens < 30  # it ended there, and did not only cut afterwards


def test_of_several_stop_strings_the_earliest_in_the_text_counts(generator: Generator) -> None:
    (whole,) = generator.complete(["def add"], max_new_tokens=30)[0]
    # Both are there once the last of their characters is, so that both could be the cut.
    early, late = whole.text[4:9], whole.text[6:9]
    assert whole.text.index(early) < whole.text.index(late)
    for stop in ([late, early], [early, late]):
        (cut,) = generator.complete(["def add"], max_new_tokens=30, stop=stop)[0]
        assert cut.text == whole.text[:4]


def test_a_stop_string_in_one_row_leaves_its_neighbours_alone(generator: Generator) -> None:
    whole = [c.text for (c,) in generator.complete(PROMPTS, max_new_tokens=20)]
    stop = whole[0][3:8]
    cut = [c.text for (c,) in generator.complete(PROMPTS, max_new_tokens=20, stop=[stop])]
    for before, after in zip(whole, cut, strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)


def test_rows_of_padding_are_never_chosen(generator: Generator) -> None:
    completions = generator.complete(
        PROMPTS, max_new_tokens=20, temperature=1.5, num_samples=2, seed=3
    )
    # A padded row decodes to nothing, and one of them has by far the highest score here.
    assert all(completion.text for group in completions for completion in group)


def test_end_of_text_ends_a_completion_and_is_not_in_it(folder: Path) -> None:
    generator = Generator(folder, device="cpu")
    head = generator._model.lm_head
    with torch.no_grad():
        head.bias[generator.tokenizer.eod_id] += 500.0
    (completion,) = generator.complete(["def add"], max_new_tokens=9)[0]
    assert (completion.text, completion.finish_reason, completion.num_tokens) == (
        "",
        "end_of_text",
        0,
    )


def test_long_prompts_lose_their_left_or_are_refused(folder: Path, generator: Generator) -> None:
    prompt = "a b c d " * 40
    ids = generator.tokenizer.encode(prompt)
    (completion,) = generator.complete([prompt], max_new_tokens=16)[0]
    assert completion.num_prompt_tokens == 96 - 16
    assert completion.num_cut_tokens == len(ids) - (96 - 16)
    kept = generator.tokenizer.decode(ids[-80:])
    assert completion.text == greedy_by_hand(folder, generator, kept, 16)
    with pytest.raises(UsageError, match=rf"has {len(ids)} tokens .* {len(ids) + 16} in all"):
        generator.complete([prompt], max_new_tokens=16, long_prompts="refuse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_new_tokens": 96}, "must lie between 1 and 95"),
        ({"max_new_tokens": 0}, "must lie between 1 and 95"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"num_samples": 0}, "num_samples 0"),
        ({"num_samples": 2}, "would all be the same"),
        ({"stop": [""]}, "empty stop string"),
    ],
)
def test_impossible_requests_are_refused_in_a_sentence(
    generator: Generator, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        generator.complete(["x"], **({"max_new_tokens": 4} | arguments))  # type: ignore[arg-type]


def test_a_folder_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.json"):
        Generator(tmp_path)


def test_transformers_says_nothing_while_generating(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Generator(folder, device="cpu").complete(PROMPTS, max_new_tokens=4)
    assert capfd.readouterr() == ("", "")
