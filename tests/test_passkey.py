"""The passkey evaluation without a model: prompts of exact length, order of the grid, scoring, and resuming."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from zen_turbo.cli.measure import depths_from
from zen_turbo.engine.request import RequestMetrics, RequestOutput
from zen_turbo.errors import ConfigurationError, CorruptFileError, InvalidRequestError
from zen_turbo.evals import passkey
from zen_turbo.evals.journal import Journal
from zen_turbo.evals.passkey import Cell
from zen_turbo.evals.passkey_prompt import NOISE, PasskeyPrompt, is_correct, make_key, make_prompt, prompt_text, split_units


class WordTokenizer:
    """Words with the space before them, single digits, punctuation; between chat markers. Counts the characters that it was given."""

    pattern = r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+"

    def __init__(self) -> None:
        self.texts: list[str] = ["<user>", "<assistant>"]
        self.ids = {text: index for index, text in enumerate(self.texts)}
        self.num_characters = 0

    def pieces(self, text: str) -> list[str]:
        return re.findall(self.pattern, text)

    def encode(self, text: str) -> list[int]:
        self.num_characters += len(text)
        result = [0]
        for piece in self.pieces(text):
            if piece not in self.ids:
                self.ids[piece] = len(self.texts)
                self.texts.append(piece)
            result.append(self.ids[piece])
        return [*result, 1]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[token] for token in ids if token > 1)


class UnevenTokenizer(WordTokenizer):
    """Every third noise unit has one token less: counts are not linear in the number of units."""

    def pieces(self, text: str) -> list[str]:
        first, *others = text.split(NOISE)
        result = super().pieces(first)
        for number, other in enumerate(others, 1):
            unit = super().pieces(NOISE)
            result += [unit[0] + unit[1], *unit[2:]] if number % 3 == 0 else unit
            result += super().pieces(other)
        return result


def build(tokenizer: WordTokenizer, length: int, depth: float, seed: int = 0) -> PasskeyPrompt:
    return make_prompt(tokenizer.encode, tokenizer.decode, length=length, depth=depth, seed=seed)


@pytest.mark.parametrize("kind", [WordTokenizer, UnevenTokenizer])
@pytest.mark.parametrize("depth", [0, 10, 33.3333, 50, 99, 100])
@pytest.mark.parametrize("length", [90, 512, 4096])
def test_length_is_the_largest_that_fits(kind: type[WordTokenizer], depth: float, length: int) -> None:
    tokenizer = kind()
    prompt = build(tokenizer, length, depth)
    before, after = split_units(prompt.num_units, depth)
    assert prompt.token_ids == tokenizer.encode(prompt_text(prompt.key, before, after))
    assert len(prompt.token_ids) <= length
    assert len(tokenizer.encode(prompt_text(prompt.key, *split_units(prompt.num_units + 1, depth)))) > length


def test_long_prompts_are_tokenised_once() -> None:
    tokenizer = WordTokenizer()
    prompt = build(tokenizer, 50_000, 70)
    text = tokenizer.decode(prompt.token_ids)
    assert tokenizer.num_characters < 1.05 * len(text)


@pytest.mark.parametrize("depth", [0, 20, 50, 100])
def test_key_lies_at_its_depth_and_nowhere_else(depth: float) -> None:
    tokenizer = WordTokenizer()
    prompt = build(tokenizer, 8192, depth)
    text = tokenizer.decode(prompt.token_ids)
    assert re.findall(r"\d+", text) == [prompt.key, prompt.key]
    noise = text.count(NOISE)
    before = text[: text.index("The pass key is")].count(NOISE)
    assert (noise, before) == (prompt.num_units, prompt.units_before)
    assert abs(before - noise * depth / 100) <= 0.5
    assert tokenizer.decode(prompt.token_ids[prompt.needle_position :]).startswith(prompt.key)
    assert tokenizer.decode(prompt.token_ids[: prompt.needle_position]).endswith("The pass key is ")


def test_published_form_at_depth_zero() -> None:
    text = prompt_text("28884", 0, 3)
    assert text == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n\nThe pass key is 28884. Remember it. 28884 is the pass key.\n"
        + "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 3
        + "\nWhat is the pass key?"
    )


def test_keys_are_reproducible_and_differ() -> None:
    cells = list(itertools.product((8192, 16384), range(0, 101, 10), range(2)))
    keys = [make_key(*cell) for cell in cells]
    assert keys == [make_key(length, float(depth), seed) for length, depth, seed in cells]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys)
    assert make_key(8192, 0, 0) == "93194"  # pinned: a change of the generator needs a new GENERATOR_VERSION


def test_too_short_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least") as caught:
        build(WordTokenizer(), 40, 50)
    assert caught.value.param == "lengths"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("28884", True),
        ("The pass key is 28884.", True),
        (" 28884\n28885", True),
        ("**28884**", True),
        ("The pass key is 28885. No, 28884.", False),
        ("128884", False),
        ("28,884", False),
        ("2888", False),
        ("two eight eight eight four", False),
        ("", False),
    ],
)
def test_scorer(answer: str, expected: bool) -> None:
    assert is_correct(answer, "28884") is expected


def test_depths() -> None:
    assert passkey.depths_of(11) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert passkey.depths_of(1) == [50]
    assert passkey.depths_of([90, 0, 12.5, 0]) == [0, 12.5, 90]
    for wrong in ([], [-1], [101], [float("nan")]):
        with pytest.raises(ConfigurationError, match="percentages"):
            passkey.depths_of(wrong)
    assert passkey.depths_of(4) == [0, 33.3333, 66.6667, 100]
    with pytest.raises(ConfigurationError):
        passkey.depths_of(0)


def test_depths_on_the_command_line() -> None:
    assert [depths_from(text) for text in ("11", "0,25,90", "25%", "0%, 12.5%")] == [11, [0, 25, 90], [25], [0, 12.5]]
    for text in ("", "ten", "%", "1,,2"):
        with pytest.raises(ConfigurationError, match="depths"):
            depths_from(text)


def test_plan_covers_the_grid_and_reuses_the_most() -> None:
    cells = passkey.plan([2000, 1000], 5, 1)
    assert sorted(cells) == sorted(Cell(length, depth, 0) for length in (1000, 2000) for depth in (0, 25, 50, 75, 100))
    reused = sum(passkey.shared_tokens(cells, 1))
    groups = [cells[:5], cells[5:]]
    best = max(
        sum(passkey.shared_tokens([*first, *second], 1))
        for first in itertools.permutations(groups[0])
        for second in (groups[1], groups[1][::-1])
    )
    assert reused == best == (0 + 250 + 500 + 750) + 1000 + (1500 + 1000 + 500 + 0)


def test_shared_prefix_is_what_the_prompts_share() -> None:
    tokenizer = WordTokenizer()
    cells = passkey.plan([512], 5, 2)
    prompts = [build(tokenizer, *cell) for cell in cells]
    for (first, second), estimate in zip(itertools.pairwise(prompts), passkey.shared_tokens(cells, 1)[1:], strict=True):
        pairs = zip(first.token_ids, second.token_ids, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        shallower = min(first.needle_position, second.needle_position)
        assert shallower - 6 <= shared <= shallower + 5  # from the sentence's first word to the key's last digit
        assert abs(shared - estimate) < 60  # header, instruction and question are not noise


class Answers:
    """Stands in for the engine: the right key for every prompt but those listed, or an error after so many."""

    def __init__(self, tokenizer: WordTokenizer, *, wrong: tuple[int, ...] = (), fail_after: int | None = None) -> None:
        self.tokenizer, self.wrong, self.fail_after = tokenizer, wrong, fail_after
        self.count = 0

    def __call__(self, token_ids: list[int]) -> RequestOutput:
        if self.count == self.fail_after:
            raise KeyboardInterrupt
        found = re.search(r"\d+", self.tokenizer.decode(token_ids))
        assert found is not None
        text = f"The pass key is {int(found[0]) + (self.count in self.wrong)}."
        self.count += 1
        metrics = RequestMetrics(ttft_s=1.25, density=0.5)
        return RequestOutput(
            request_id="r",
            text=text,
            token_ids=(1,),
            prompt_tokens=len(token_ids),
            cached_tokens=64,
            finish_reason="stop",
            metrics=metrics,
        )


def evaluate(path: Path | None, answers: Answers, cells: list[Cell], key: dict[str, object] | None = None) -> list[dict[str, object]]:
    with Journal(path, key or {"model": "m"}, Cell._fields, commit="c1") as journal:
        facts = {"attention": "dense"}
        return passkey.evaluate(cells, lambda cell: build(answers.tokenizer, *cell), answers, journal=journal, facts=lambda output: facts)


def test_rows() -> None:
    cells = passkey.plan([256], 3, 1)
    rows = evaluate(None, Answers(WordTokenizer(), wrong=(1,)), cells)
    assert [row["correct"] for row in rows] == [True, False, True]
    assert [row["depth"] for row in rows] == [0, 50, 100]
    assert {row["cached_tokens"] for row in rows} == {64}
    assert all(row["expected"] in str(row["answer"]) for row in rows if row["correct"])
    assert passkey.grid(rows) == (["length", "0 %", "50 %", "100 %"], [{"length": 256, "0 %": "1/1", "50 %": "0/1", "100 %": "1/1"}])


def test_interrupted_run_resumes(tmp_path: Path) -> None:
    path, cells, tokenizer = tmp_path / "rows.jsonl", passkey.plan([256], 5, 1), WordTokenizer()
    with pytest.raises(KeyboardInterrupt):
        evaluate(path, Answers(tokenizer, fail_after=2), cells)
    second = Answers(tokenizer)
    rows = evaluate(path, second, cells)
    assert second.count == 3
    assert rows == evaluate(None, Answers(tokenizer), cells)
    third = Answers(tokenizer)
    assert evaluate(path, third, passkey.plan([256], 5, 2))[:5] == rows  # a larger grid keeps what was done
    assert third.count == 5


def test_journal_drops_a_torn_line_and_keeps_the_rest(tmp_path: Path) -> None:
    path, cells = tmp_path / "rows.jsonl", passkey.plan([256], 3, 1)
    evaluate(path, Answers(WordTokenizer()), cells)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    answers = Answers(WordTokenizer())
    evaluate(path, answers, cells)
    assert answers.count == 1
    assert path.read_bytes() == whole


def test_journal_of_other_settings_is_refused(tmp_path: Path) -> None:
    path, cells = tmp_path / "rows.jsonl", passkey.plan([256], 1, 1)
    evaluate(path, Answers(WordTokenizer()), cells, {"model": "m", "attention": "dense"})
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="model: 'm' there, 'other' now"):
        evaluate(path, Answers(WordTokenizer()), cells, {"model": "other", "attention": "dense"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["not json\n", '{"rows": 1}\n', "[1]\n", '{"key": {"model": "m"}}\n{"row": {"length": 1}, "commit": null}\n']
)
def test_journal_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(CorruptFileError):
        Journal(path, {"model": "m"}, Cell._fields)


def test_journal_has_one_owner(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, {"a": 1}, Cell._fields), pytest.raises(ConfigurationError, match="Another process"):
        Journal(path, {"a": 1}, Cell._fields)
    with Journal(path, {"a": 1}, Cell._fields) as journal:
        assert journal.num_rows == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"key": {"a": 1}}]


def test_journal_lies_beside_the_output() -> None:
    assert passkey.journal_path(Path("a/b.json"), None) == Path("a/b.json.rows.jsonl")
    assert passkey.journal_path(Path("a/b.json"), Path("c")) == Path("c")
    assert passkey.journal_path(None, None) is None


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "4 s"), (89, "89 s"), (95, "2 min"), (5400, "1 h 30 min"), (12_060, "3 h 21 min")])
def test_duration(seconds: float, text: str) -> None:
    assert passkey.duration(seconds) == text
