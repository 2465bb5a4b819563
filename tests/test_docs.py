"""The pages say what is so: files exist, command lines parse, links lead on, figures agree."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError

from phi1_megatron.cli import _GROUPS, _VERBS, build_app
from phi1_megatron.commands.convert import convert
from phi1_megatron.commands.preprocess import preprocess
from phi1_megatron.config.load import load_recipe
from phi1_megatron.distributed.layout import model_parallel_size, plan_layout
from phi1_megatron.planning.flops import count_parameters
from tools.docs.configuration import document
from tools.docs.draw_layout import share_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [*sorted((ROOT / "examples").glob("*.sh")), *sorted((ROOT / "slurm").glob("*.sbatch"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def section(title: str) -> str:
    """The README's section of a title, to the next of its level."""
    _, _, rest = README.partition(f"\n## {title}\n")
    assert rest, f"README.md has no section {title}"
    return rest.partition("\n## ")[0]


def code_lines(text: str) -> Iterator[list[str]]:
    """The words of every command in a page's ``sh`` blocks."""
    for _, language, body in FENCE.findall(text):
        if language == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                yield shlex.split(line, comments=True)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def our_words(words: list[str]) -> list[str] | None:
    """The arguments of ``phi1`` in a command line, whoever launches it; None for another one."""
    for number, word in enumerate(words):
        if word == "phi1" or words[number - 1 : number + 1] == ["-m", "phi1_megatron"]:
            return words[number + 1 :]
    return None


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in code_lines(page.read_text(encoding="utf-8"))
    if words
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_on_a_page_is_one_that_this_repository_understands(words: list[str]) -> None:
    ours = our_words(words)
    if ours is not None:
        understood(build_app(), ours)
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert f"\n{words[1]}: " in targets, f"make has no target {words[1]}"
    elif words[0] in {"sh", "python", "sbatch"} or words[0].endswith("/python"):
        scripts = [word for word in words if word.endswith((".py", ".sh", ".sbatch"))]
        assert all((ROOT / script).is_file() for script in scripts), scripts
        for verb in (preprocess, convert):
            if scripts and scripts[0].endswith((f"{verb.__name__}_data.py", f"{verb.__name__}.py")):
                understood(alone(verb), words[words.index(scripts[0]) + 1 :])
    else:
        assert words[0] == "sudo", f"nothing here knows {words[0]}"


def alone(verb: object) -> App:
    app = App(name="script")
    app.default(verb)  # type: ignore[call-overload]
    return app


def understood(app: App, words: list[str]) -> None:
    """Verb and flags exist, the recipe is there, and the overrides are fields of a recipe."""
    try:
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        pytest.fail(f"{' '.join(words)}: {error}")
    recipe = bound.arguments.get("recipe")
    if recipe is not None:
        config = load_recipe(ROOT / recipe, bound.arguments.get("overrides", ()))
        ranks = bound.arguments.get("num_processes")
        plan_layout(config, ranks or model_parallel_size(config.parallel))


def test_the_check_of_command_lines_sees_a_wrong_one() -> None:
    for wrong in (["trian", "x.toml"], ["train", "x.toml", "--no-such-flag"], ["export", "one"]):
        with pytest.raises(pytest.fail.Exception):
            understood(build_app(), wrong)


@named
def test_verbs_and_flags_that_the_text_speaks_of_exist(page: Path) -> None:
    helps = _helps()
    for code in re.findall(r"`(phi1 [^`]+)`", prose(page.read_text(encoding="utf-8"))):
        words = " ".join(code.split()).split(" ")[1:]
        verb = " ".join(words[: 2 if words[0] in _GROUPS else 1])
        if verb.startswith("--") or verb in _GROUPS:
            continue
        assert verb in helps, f"{page.name} speaks of {code}"
        flags = [word for word in words if word.startswith("--")]
        assert [flag for flag in flags if flag not in helps[verb]] == [], code


def _helps() -> dict[str, set[str]]:
    """Every verb and its flags."""
    app, found = build_app(), {}
    grouped = (f"{group} {verb}" for group, (_, verbs) in _GROUPS.items() for verb in verbs)
    for verb in (*_VERBS, *grouped):
        _, chain, _ = app.parse_commands(verb.split())
        arguments = chain[-1].assemble_argument_collection()
        found[verb] = {name for argument in arguments for name in argument.names}
    return found


@named
def test_every_link_leads_somewhere(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    links = [" ".join(link.split()) for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_of_the_file_map_is_there() -> None:
    paths = re.findall(r"^\| `([^`]+)` \|", section("File map"), flags=re.MULTILINE)
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


@named
def test_every_file_that_the_text_speaks_of_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|tools|examples|docs|slurm|phi1_megatron)/[\w./-]+)`", text):
        if "/a/" not in path:  # the pattern of the tests' names, not a file
            assert (ROOT / path).exists(), f"{page.name} speaks of {path}"


def test_the_table_of_recipes_counts_what_the_recipes_say() -> None:
    rows = re.findall(r"^\| \[([\w.]+)\]\(.*$", section("Train"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "examples/recipes").glob("*.toml"))
    for line in section("Train").splitlines():
        if line.startswith("| ["):
            name, parameters, _, ranks, tokens, steps = (
                cell.strip() for cell in line.split("|")[1:-1]
            )
            config = load_recipe(ROOT / "examples/recipes" / name.split("]")[0].strip("["))
            batch = config.training.global_batch_size * config.data.seq_length
            assert number(parameters) == count_parameters(config.model).total
            assert number(tokens) == batch
            assert number(steps) == config.training.train_steps
            assert plan_layout(config, number(ranks)).world_size == number(ranks)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_page_of_configuration_is_what_the_schema_says() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == document(), "python tools/docs/configuration.py > docs/configuration.md"


def test_the_picture_of_a_layout_gives_every_part_to_one_rank_of_a_copy() -> None:
    config = load_recipe(ROOT / "examples/recipes/phi1_tp2_pp2.toml")
    layout = plan_layout(config, 8)
    shares = [share_of(rank, config, layout).lines for rank in range(8)]
    assert shares[0] == shares[2]
    assert shares[5] == shares[7]
    first_copy = {rank: shares[rank] for rank in (0, 1, 4, 5)}
    assert len(set(first_copy.values())) == 4
    assert shares[0][0] == "layers 0 to 5 and 12 to 17"
    assert shares[4][0] == "layers 6 to 11 and 18 to 23"
    assert shares[1][1] == "heads 16 to 31, MLP rows 4,096 to 8,191"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_shell_and_its_command_lines_parse(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    shell = "bash" if text.startswith("#!/usr/bin/env bash") else "sh"
    subprocess.run([shell, "-n", str(script)], check=True)
    helps, seen = _helps(), 0
    for line in text.replace("\\\n", " ").splitlines():
        command = re.match(r"\s*(?:.*-m phi1_megatron|phi1) (\w.*)$", line)
        if command is None:
            continue
        words = command.group(1).split()
        verb = " ".join(words[: 2 if words[0] in _GROUPS else 1])
        assert verb in helps, line
        assert {word for word in words if word.startswith("--")} <= helps[verb], line
        seen += 1
    assert seen or "phi1" not in text


def test_a_script_without_arguments_says_how_it_is_called() -> None:
    for script in SCRIPTS:
        shell = "bash" if script.suffix == ".sbatch" else "sh"
        done = subprocess.run([shell, str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 2, script
        assert script.name in done.stderr


@named
def test_a_page_has_lines_that_fit(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    # tables cannot be folded, and the configuration's page is made of them
    long = [line for line in lines if len(line) > 100 and not line.startswith("|")]
    assert [line for line in long if page.name != "configuration.md"] == []
