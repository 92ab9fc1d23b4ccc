"""MR-NIAH, needles in dialogues of many rounds (paper figure 15): repeat an answer given long ago.

Three rounds are inserted after 25, 50 and 75 % of the other rounds: the target, another round with the same request, and a
round with the same kind of request on another subject. So both the request and the order matter. In the other rounds the
assistant continues a text of the embedded corpus. --data reads the released files: LENGTH_tokens.jsonl with the columns
messages, label and length_class.
"""
import collections
import itertools
import re
from pathlib import Path

import numpy as np

from mmx.config import ConfigError
from mmx.evals import haystack, user_files
from mmx.evals.examples import (
    Example,
    PlannedExample,
    SuiteOptions,
    answer_budget,
    check_rows,
    fit_to_length,
    grid_plan,
    make_rng,
)

DEPTHS = ("25", "50", "75")
ROUND = 60     # words in each of the other rounds, or slightly more
REFUSALS = {True: ("抱歉", "没有之前的对话"), False: ("sorry", "no previous conversation")}      # Chinese, English
SUBJECTS = ("penguins", "the harbour", "old trains", "a lighthouse", "winter", "the orchard", "swallows", "a market day",
            "the desert", "mountain huts", "the night shift", "a river ferry")
# the request; its name in the final question; the template of an answer's lines, from an adjective, a noun and a verb
KINDS = {
    "poem": ("Write a short poem about {}.", "poem that you wrote about {}", "the {0} {1} {2},"),
    "description": ("Describe {} in a few words.", "description that you gave of {}", "{0} {1},"),
    "list": ("Name three things that go with {}.", "list of things that you named for {}", "{n}. {0} {1}"),
}
ADJECTIVES = ("silver", "patient", "crooked", "hollow", "amber", "sleepy", "distant", "salted", "narrow", "velvet", "frozen",
              "borrowed", "crimson", "restless", "woven", "tidy")
NOUNS = ("lantern", "kettle", "ribbon", "compass", "feather", "ladder", "anchor", "violin", "pebble", "curtain", "basket",
         "whistle", "mirror", "thimble", "saddle", "candle")
VERBS = ("hums", "waits", "drifts", "glows", "listens", "turns", "wanders", "trembles", "sings", "rests")


def example(length: int, depth: str, seed, options: SuiteOptions) -> Example:
    rng = make_rng("mr-niah", length, depth, seed)
    request, name, form = KINDS[list(KINDS)[rng.integers(len(KINDS))]]
    target, other = (SUBJECTS[i] for i in rng.choice(len(SUBJECTS), 2, replace=False))
    answers = _make_answers(rng, form)
    order = ("wanted", "same", "other"), ("same", "wanted", "other"), ("same", "other", "wanted")
    order = order[DEPTHS.index(depth)]
    subjects = {"wanted": target, "same": target, "other": other}
    injected = [(request.format(subjects[which]), answers[which]) for which in order]
    ordinal = "first" if order.index("wanted") < order.index("same") else "second"
    last = f"Please repeat the {ordinal} {name.format(target)}."
    essay = haystack.Essay(rng, length, options.train)

    def build(n):
        words = essay.take(n)
        bounds = np.linspace(0, n, max(n // ROUND, 1) + 1).astype(int)
        rounds = [_continue_text(words[a:b]) for a, b in itertools.pairwise(bounds)] if n > 1 else []
        for depth, injected_round in zip((0.75, 0.5, 0.25), reversed(injected)):
            rounds.insert(int(depth * len(rounds)), injected_round)
        return render([*itertools.chain(*rounds), last])

    n, prompt = fit_to_length(build, length, options.tokenizer, "mr-niah")
    label = answers["wanted"]
    return Example(prompt, tuple(components(label)), answer_budget(options.tokenizer, 64, [label]), ("\nUser:",),
                   {"seen": essay.uses_training_text(n), "chinese": False})


def _make_answers(rng, form: str) -> dict[str, str]:
    """Three answers of the same form that share no adjective, noun or verb."""
    picks = [rng.permutation(len(words))[:9].reshape(3, 3) for words in (ADJECTIVES, NOUNS, VERBS)]
    answers = {}
    for i, which in enumerate(("wanted", "same", "other")):
        lines = [form.format(ADJECTIVES[a], NOUNS[b], VERBS[c], n=n)
                 for n, (a, b, c) in enumerate(zip(*(pick[i] for pick in picks)), 1)]
        text = "\n".join(lines)
        answers[which] = text[:-1] + "." if text.endswith(",") else text
    return answers


def _continue_text(words: list[str]) -> tuple[str, str]:
    first = min(12, len(words) // 2)
    return f"Go on from here: {' '.join(words[:first])}", " ".join(words[first:])


def render(messages: list[str]) -> str:
    """A dialogue as a text to continue; the user speaks first and last."""
    turns = [f"{who}: {text}" for who, text in zip(itertools.cycle(("User", "Assistant")), messages)]
    return "\n".join([*turns, "Assistant:"])


def components(label: str) -> list[str]:
    """The parts of an answer that are scored: the items of a numbered list; else lines, if there are several and all end with a
    full stop; else clauses.

    The released score.py lists the parts of its twenty labels in a table. This rule gives the same parts.
    """
    lines = [line.strip() for line in label.strip().split("\n")]
    if all(re.match(r"\d+\. ", line) for line in lines):
        return [line.split(". ", 1)[1] for line in lines]
    if len(lines) == 1 or not all(line.endswith((".", "。")) for line in lines):
        lines = re.split("[,，\n]", label)
    return [part for part in (line.strip().rstrip(".。") for line in lines) if part]


def score(output: str, example: Example) -> float:
    """The fraction of the components that the output contains; 0 for a refusal."""
    chinese = example.meta["chinese"]
    if any(phrase in (output if chinese else output.lower()) for phrase in REFUSALS[chinese]):
        return 0.0
    return float(np.mean([answer in output for answer in example.answers]))


def plan(options: SuiteOptions):
    if options.data:
        return _plan_released(options)
    return grid_plan(example, (4096,), DEPTHS, 10)(options)


def _plan_released(options: SuiteOptions):
    """Plans the records of the user's files, by length.

    The records of one label and length are in the order of their depths.
    """
    check_rows(options.rows, DEPTHS)
    paths = user_files.list_jsonl(Path(options.data)) if Path(options.data).is_dir() else [Path(options.data)]
    if not paths or not all(path.is_file() for path in paths):
        raise ConfigError(f"mr-niah: no .jsonl file in --data {options.data}; the released files have names such as "
                          "2048_tokens.jsonl")
    planned, ranks, cells = [], {}, collections.Counter()
    for path in paths:
        for number, record in enumerate(user_files.records(path), 1):
            where = f"{path}:{number}"
            messages = [user_files.column(m, "content", where, str)
                        for m in user_files.column(record, "messages", where, list)]
            label = user_files.column(record, "label", where, str)
            length = user_files.column(record, "length_class", where, int)
            if not options.lengths or length in options.lengths:
                ranks[length, label] = rank = ranks.get((length, label), -1) + 1
                depth = DEPTHS[rank % 3]
                planned.append(PlannedExample(depth, str(length), cells[depth, length],
                                              lambda m=messages, label=label: _released_example(m, label, options)))
                cells[depth, length] += 1
    lengths = sorted({int(one.column) for one in planned})
    if not planned:
        raise ConfigError(f"mr-niah: no record of {options.data} has a length_class of --lengths")
    limit = options.examples or len(planned)
    return [one for length in lengths for one in planned
            if int(one.column) == length and one.index < limit and one.row in (options.rows or DEPTHS)]


def _released_example(messages: list[str], label: str, options: SuiteOptions) -> Example:
    chinese = bool(re.search("[\u4e00-\u9fff]", label))
    return Example(render(messages), tuple(components(label)), answer_budget(options.tokenizer, 64, [label]), ("\nUser:",),
                   {"chinese": chinese})
