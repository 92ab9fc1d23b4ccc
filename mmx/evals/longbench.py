"""LongBench v2 (arXiv 2412.15204): questions of four choices on long texts, from the user's copy of its data.json.

The answer is what its own extraction finds. A prompt longer than --context loses its middle, as in its own runs.
"""
import re
from pathlib import Path

from mmx.config import ConfigError
from mmx.evals import user_files
from mmx.evals.examples import Ask, Example, Task, check_rows, count

ROWS = ("easy", "hard")
COLUMNS = ("short", "medium", "long")
TEXTS = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "context")


def plan(ask: Ask):
    if ask.lengths:
        raise ConfigError("longbench2 has texts of their own lengths: leave --lengths out; --context cuts them")
    check_rows(ask.rows, ROWS)
    single = ask.data and Path(ask.data).is_file()
    path = Path(ask.data) if single else user_files.find(ask.data, "data.json", "longbench2")
    tasks = []
    for number, record in enumerate(user_files.records(path), 1):
        place = f"{path}, entry {number}"
        texts = {name: user_files.column(record, name, place, str) for name in TEXTS}
        row, column, answer = (user_files.column(record, name, place, str) for name in ("difficulty", "length", "answer"))
        for name, value, known in (("difficulty", row, ROWS), ("length", column, COLUMNS), ("answer", answer, tuple("ABCD"))):
            if value not in known:
                raise ConfigError(f"{place}: column {name!r} is {value!r}, none of {', '.join(known)}")
        index = sum(task[:2] == (row, column) for task in tasks)
        tasks.append(Task(row, column, index, lambda t=texts, answer=answer: _example(t, answer, ask)))
    limit = ask.examples or len(tasks)
    return [t for column in COLUMNS for t in tasks
            if t.column == column and t.index < limit and t.row in (ask.rows or ROWS)]


def _example(texts: dict, answer: str, ask: Ask) -> Example:
    choices = "\n".join(f"({letter}) {texts[f'choice_{letter}'].strip()}" for letter in "ABCD")
    prompt = (f"Read this text, then answer the question on it.\n\n<text>\n{texts['context'].strip()}\n</text>\n\n"
              f"Question: {texts['question'].strip()}\nChoices:\n{choices}\n\n"
              'Answer in this form: "The correct answer is (letter)".\n')
    whole = count(prompt, ask.tokenizer)
    cut = bool(ask.context) and whole > ask.context
    return Example(without_middle(prompt, ask.context, ask.tokenizer) if cut else prompt, (answer,), 128, meta={"cut": cut})


def without_middle(text: str, limit: int, tokenizer) -> str:
    """The beginning and the end of a text, of at most `limit` tokens together."""
    ids, keep = tokenizer.encode(text.encode()), limit - 1
    while True:
        half = keep // 2
        cut = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half:])
        if count(cut, tokenizer) <= limit:
            return cut
        keep -= max(1, count(cut, tokenizer) - limit)       # a character cut apart may come back as more tokens


def extract(output: str) -> str | None:
    """The letter that an answer gives, by LongBench v2's rule."""
    output = output.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", output) or re.search(r"The correct answer is ([A-D])", output)
    return found and found[1]


def score(output: str, example: Example) -> float:
    return float(extract(output) == example.answers[0])
