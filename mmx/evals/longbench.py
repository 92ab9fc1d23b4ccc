"""LongBench v2 (arXiv 2412.15204): questions of four choices on long texts, from the user's copy of its data.json.

Answers are extracted by the benchmark's rule. If a prompt is longer than --context, its middle is removed, as in the benchmark.
"""
import re
from pathlib import Path

from mmx.config import ConfigError
from mmx.data import tokens
from mmx.evals import user_files
from mmx.evals.examples import Example, PlannedExample, SuiteOptions, check_rows, count_tokens

ROWS = ("easy", "hard")
COLUMNS = ("short", "medium", "long")
TEXTS = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "context")


def plan(options: SuiteOptions):
    if options.lengths:
        raise ConfigError("longbench2 has texts of fixed lengths: leave --lengths out; --context shortens them")
    check_rows(options.rows, ROWS)
    single = options.data and Path(options.data).is_file()
    path = Path(options.data) if single else user_files.find(options.data, "data.json", "longbench2")
    planned = []
    for number, record in enumerate(user_files.records(path), 1):
        where = f"{path}, entry {number}"
        texts = {name: user_files.column(record, name, where, str) for name in TEXTS}
        row, column, answer = (user_files.column(record, name, where, str) for name in ("difficulty", "length", "answer"))
        for name, value, known in (("difficulty", row, ROWS), ("length", column, COLUMNS), ("answer", answer, tuple("ABCD"))):
            if value not in known:
                raise ConfigError(f"{where}: column {name!r} is {value!r}, but must be one of {', '.join(known)}")
        index = sum(one[:2] == (row, column) for one in planned)
        planned.append(PlannedExample(row, column, index, lambda t=texts, answer=answer: _example(t, answer, options)))
    limit = options.examples or len(planned)
    return [one for column in COLUMNS for one in planned
            if one.column == column and one.index < limit and one.row in (options.rows or ROWS)]


def _example(texts: dict, answer: str, options: SuiteOptions) -> Example:
    choices = "\n".join(f"({letter}) {texts[f'choice_{letter}'].strip()}" for letter in "ABCD")
    prompt = (f"Read this text, then answer the question on it.\n\n<text>\n{texts['context'].strip()}\n</text>\n\n"
              f"Question: {texts['question'].strip()}\nChoices:\n{choices}\n\n"
              'Answer in this form: "The correct answer is (letter)".\n')
    too_long = bool(options.context) and count_tokens(prompt, options.tokenizer) > options.context
    if too_long:
        prompt = remove_middle(prompt, options.context, options.tokenizer)
    return Example(prompt, (answer,), 128, meta={"cut": too_long})


def remove_middle(text: str, limit: int, tokenizer) -> str:
    """The beginning and the end of a text, together at most `limit` tokens."""
    ids, keep = tokenizer.encode(text.encode()), limit - 1
    while True:
        half = keep // 2
        end = len(ids) - half
        shortened = tokenizer.decode(ids[:half]) + tokens.decode_continuation(
            tokenizer, tokens.tail(tokenizer, ids[:end]), ids[end:])
        if count_tokens(shortened, tokenizer) <= limit:
            return shortened
        keep -= max(1, count_tokens(shortened, tokenizer) - limit)      # a split character may be encoded as more tokens


def extract(output: str) -> str | None:
    """The letter that an output gives as its answer, by LongBench v2's rule; None without one."""
    output = output.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", output) or re.search(r"The correct answer is ([A-D])", output)
    return found and found[1]


def score(output: str, example: Example) -> float:
    return float(extract(output) == example.answers[0])
