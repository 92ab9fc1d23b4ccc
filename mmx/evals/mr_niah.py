"""MR-NIAH, needles in dialogues of many rounds (MiniMax-01, figure 15): repeat what you answered long ago.

Three rounds stand at 25, 50 and 75 % of the others: the one asked for, another of the very same request, and one of the
same kind on another subject, so that request and order both matter. The others go on with text of the embedded corpus.
A folder of the released files, LENGTH_tokens.jsonl with the columns messages, label and length_class, is read as it is.
"""
import collections
import itertools
import re
from pathlib import Path

import numpy as np

from mmx.config import ConfigError
from mmx.evals import haystack, user_files
from mmx.evals.examples import Ask, Example, Task, budget, check_rows, draws, fit, grid

DEPTHS = ("25", "50", "75")
ROUND = 60     # words of one of the other rounds, or somewhat more
REFUSALS = {True: ("抱歉", "没有之前的对话"), False: ("sorry", "no previous conversation")}      # Chinese, English
SUBJECTS = ("penguins", "the harbour", "old trains", "a lighthouse", "winter", "the orchard", "swallows", "a market day",
            "the desert", "mountain huts", "the night shift", "a river ferry")
KINDS = {       # what the request says, what its repetition says, and how three of NOUNS, ADJECTIVES and VERBS make the answer
    "poem": ("Write a short poem about {}.", "poem that you wrote about {}", "the {0} {1} {2},"),
    "description": ("Describe {} in a few words.", "description that you gave of {}", "{0} {1},"),
    "list": ("Name three things that go with {}.", "list of things that you named for {}", "{n}. {0} {1}"),
}
ADJECTIVES = ("silver", "patient", "crooked", "hollow", "amber", "sleepy", "distant", "salted", "narrow", "velvet", "frozen",
              "borrowed", "crimson", "restless", "woven", "tidy")
NOUNS = ("lantern", "kettle", "ribbon", "compass", "feather", "ladder", "anchor", "violin", "pebble", "curtain", "basket",
         "whistle", "mirror", "thimble", "saddle", "candle")
VERBS = ("hums", "waits", "drifts", "glows", "listens", "turns", "wanders", "trembles", "sings", "rests")


def example(length: int, depth: str, seed, ask: Ask) -> Example:
    draw = draws("mr-niah", length, depth, seed)
    request, name, form = KINDS[list(KINDS)[draw.integers(len(KINDS))]]
    wanted, other = (SUBJECTS[i] for i in draw.choice(len(SUBJECTS), 2, replace=False))
    answers = _answers(draw, form)
    order = ("wanted", "same", "other"), ("same", "wanted", "other"), ("same", "other", "wanted")
    order = order[DEPTHS.index(depth)]
    subjects = {"wanted": wanted, "same": wanted, "other": other}
    injected = [(request.format(subjects[which]), answers[which]) for which in order]
    place = "first" if order.index("wanted") < order.index("same") else "second"
    last = f"Please repeat the {place} {name.format(wanted)}."
    essay = haystack.Essay(draw, length, ask.train)

    def build(n):
        words = essay.take(n)
        cuts = np.linspace(0, n, max(n // ROUND, 1) + 1).astype(int)
        rounds = [_continued(words[a:b]) for a, b in itertools.pairwise(cuts)] if n > 1 else []
        for share, chosen in zip((0.75, 0.5, 0.25), reversed(injected)):
            rounds.insert(int(share * len(rounds)), chosen)
        return render([*itertools.chain(*rounds), last])

    n, prompt = fit(build, length, ask.tokenizer, "mr-niah")
    label = answers["wanted"]
    return Example(prompt, tuple(components(label)), budget(ask.tokenizer, 64, [label]), ("\nUser:",),
                   {"seen": essay.seen(n), "chinese": False})


def _answers(draw, form: str) -> dict[str, str]:
    """Three different answers of one form, of no part alike."""
    picks = [draw.permutation(len(words))[:9].reshape(3, 3) for words in (ADJECTIVES, NOUNS, VERBS)]
    found = {}
    for i, which in enumerate(("wanted", "same", "other")):
        lines = [form.format(ADJECTIVES[a], NOUNS[b], VERBS[c], n=n)
                 for n, (a, b, c) in enumerate(zip(*(pick[i] for pick in picks)), 1)]
        text = "\n".join(lines)
        found[which] = text[:-1] + "." if text.endswith(",") else text
    return found


def _continued(words: list[str]) -> tuple[str, str]:
    first = min(12, len(words) // 2)
    return f"Go on from here: {' '.join(words[:first])}", " ".join(words[first:])


def render(messages: list[str]) -> str:
    """A dialogue, the user's turn first and last, as a text to be continued."""
    turns = [f"{who}: {text}" for who, text in zip(itertools.cycle(("User", "Assistant")), messages)]
    return "\n".join([*turns, "Assistant:"])


def components(label: str) -> list[str]:
    """What an answer is scored by: the items of a numbered list; else lines, if several all end in a full stop; else clauses.

    This gives the table of the released score.py for each of its twenty labels.
    """
    lines = [line.strip() for line in label.strip().split("\n")]
    if all(re.match(r"\d+\. ", line) for line in lines):
        return [line.split(". ", 1)[1] for line in lines]
    if len(lines) == 1 or not all(line.endswith((".", "。")) for line in lines):
        lines = re.split("[,，\n]", label)
    return [part for part in (line.strip().rstrip(".。") for line in lines) if part]


def score(output: str, example: Example) -> float:
    """The share of the components that the output holds; 0 for a refusal."""
    chinese = example.meta["chinese"]
    if any(phrase in (output if chinese else output.lower()) for phrase in REFUSALS[chinese]):
        return 0.0
    return float(np.mean([answer in output for answer in example.answers]))


def plan(ask: Ask):
    if ask.data:
        return _released(ask)
    return grid(example, (4096,), DEPTHS, 10)(ask)


def _released(ask: Ask):
    """The rows of the user's files, by length; a label's rows of one length come in the order of their depths."""
    check_rows(ask.rows, DEPTHS)
    paths = sorted(Path(ask.data).glob("*.jsonl")) if Path(ask.data).is_dir() else [Path(ask.data)]
    if not paths or not all(path.is_file() for path in paths):
        raise ConfigError(f"mr-niah: no .jsonl file in --data {ask.data}; the released ones have names as 2048_tokens.jsonl")
    tasks, met, cells = [], {}, collections.Counter()
    for path in paths:
        for number, record in enumerate(user_files.records(path), 1):
            place = f"{path}:{number}"
            messages = [user_files.column(m, "content", place, str) for m in user_files.column(record, "messages", place, list)]
            label = user_files.column(record, "label", place, str)
            length = user_files.column(record, "length_class", place, int)
            if not ask.lengths or length in ask.lengths:
                met[length, label] = rank = met.get((length, label), -1) + 1
                depth = DEPTHS[rank % 3]
                tasks.append(Task(depth, str(length), cells[depth, length],
                                  lambda m=messages, label=label: _example(m, label, ask)))
                cells[depth, length] += 1
    lengths = sorted({int(task.column) for task in tasks})
    if not tasks:
        raise ConfigError(f"mr-niah: no row of {ask.data} has a length_class of --lengths")
    limit = ask.examples or len(tasks)
    return [task for length in lengths for task in tasks
            if int(task.column) == length and task.index < limit and task.row in (ask.rows or DEPTHS)]


def _example(messages: list[str], label: str, ask: Ask) -> Example:
    chinese = bool(re.search("[\u4e00-\u9fff]", label))
    return Example(render(messages), tuple(components(label)), budget(ask.tokenizer, 64, [label]), ("\nUser:",),
                   {"chinese": chinese})
