"""RULER (arXiv 2404.06654): its thirteen tasks with its parameters, in our words.

Retrieval (niah_*), tracing of variables (vt), common and frequent words (cwe, fwe) are generated; questions (qa_1, qa_2)
come from SQuAD and HotpotQA files of the user, squad.json and hotpotqa.json. A task's prompt ends where RULER begins the
answer. vt and cwe show one worked example before, as RULER does.
"""
import functools
import math
import uuid
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.evals import haystack, user_files
from mmx.evals.examples import Ask, Example, budget, count, draws, fit, grid, match_all, match_part

NOISE = "The lamp is warm. The road is long. The rain is soft. On we walk. Home and out again."
DEPTHS = np.linspace(0, 1, 40)      # of needles in running text
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Niah(NamedTuple):
    haystack: str       # noise, one sentence group again and again; essay; needles, all of the form of the one sought
    key: str            # words, numbers or uuids
    value: str
    keys: int = 1
    values: int = 1     # of each key
    queries: int = 1    # keys asked for


NIAH = {
    "niah_single_1": Niah("noise", "words", "numbers"),
    "niah_single_2": Niah("essay", "words", "numbers"),
    "niah_single_3": Niah("essay", "words", "uuids"),
    "niah_multikey_1": Niah("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Niah("needles", "words", "numbers"),
    "niah_multikey_3": Niah("needles", "uuids", "uuids"),
    "niah_multivalue": Niah("essay", "words", "numbers", values=4),
    "niah_multiquery": Niah("essay", "words", "numbers", keys=4, queries=4),
}


def niah(task: str, length: int, draw, ask: Ask) -> Example:
    kind = NIAH[task]
    taken = set()
    keys = [_new(draw, kind.key, taken) for _ in range(kind.keys)]
    values = [[_new(draw, kind.value, taken) for _ in range(kind.values)] for _ in keys]
    needles = [_needle(kind, key, value) for key, own in zip(keys, values) for value in own]
    draw.shuffle(needles)
    asked = draw.choice(len(keys), kind.queries, replace=False)
    answers = tuple(value for key in asked for value in values[key])
    names = [keys[key] for key in asked]
    query = ", ".join(names[:-1]) + ", and " * (len(names) > 1) + names[-1]
    noun, verb, it = (kind.value, "are", "them") if len(answers) > 1 else (kind.value[:-1], "is", "it")
    some = "some" if len(answers) > 1 else "a"
    head = f"The text below hides {some} secret {noun}. Keep {it} in mind, for a question follows."
    tail = (f"Which secret {noun} {verb} given for {query} in the text?"
            f" The secret {noun} given for {query} in the text {verb}")

    if kind.haystack == "essay":
        essay, depths = haystack.Essay(draw, length, ask.train), np.sort(draw.choice(DEPTHS, len(needles), replace=False))
        context = lambda n: haystack.hide(essay.take(n), needles, depths)
    else:
        essay, places, others = None, np.sort(draw.random(len(needles))), []

        def context(n):
            while kind.haystack == "needles" and len(others) < n:
                others.append(_needle(kind, _new(draw, kind.key, taken), _new(draw, kind.value, taken)))
            return "\n".join(_spread(others[:n] or [NOISE] * n, needles, places))
    n, prompt = fit(lambda n: f"{head}\n{context(n)}\n{tail}", length, ask.tokenizer, task)
    return Example(prompt, answers, budget(ask.tokenizer, 128, answers), meta={"seen": bool(essay and essay.seen(n))})


def vt(task: str, length: int, draw, ask: Ask) -> Example:
    """Variable tracking: one chain of four hops."""
    shown, names = _chain(500, 3, draw, ask.tokenizer)
    shown = f"{shown} {' '.join(names)}\n\n"
    prompt, names = _chain(length, 5, draw, ask.tokenizer, shown)
    return Example(prompt, tuple(names), budget(ask.tokenizer, 30, names))


def _chain(length: int, letters: int, draw, tokenizer, before: str = "") -> tuple[str, list[str]]:
    names, value, places = [], draw.integers(10_000, 100_000), np.sort(draw.random(5))
    while len(names) < 5:
        name = "".join(draw.choice(list(LETTERS.upper()), letters))
        names += [name] if name not in names else []
    lines = [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]

    def build(n):
        text = "\n".join(_spread([NOISE] * n, lines, places))
        return (f"{before}Follow the assignments of variables that are hidden in the following text.\n\n{text}\n"
                f"Question: which variables hold the value {value} in the text above? Answer: by the assignments in the text "
                f"above, 5 variables hold the value {value}, they are:")

    return fit(build, length, tokenizer, "vt")[1], names


def cwe(task: str, length: int, draw, ask: Ask) -> Example:
    """Common words: ten that come 30 times among others that come 3 times; 6 and 1 below 4,096 tokens.

    RULER's tokens are parts of words: where they are bytes, 30 may not fit at 4,096 either, and 6 and 1 are taken.
    """
    size = length // (2 if length < 4096 else 6)        # more than fit: a word and its number are two tokens or more
    pool, order = haystack.words(draw, 50 + size), draw.integers(2**63)
    shown, pool = pool[:40], pool[40:]

    def build(n, short):
        draw = np.random.default_rng(order)
        worked = _list(shown[:20], 3, 1, draw) if short else _list(shown, 10, 3, draw)
        common = " ".join(f"{i}. {word}" for i, word in enumerate(shown[:10], 1))
        return f"{worked} {common}\n{_list(pool[:10 + n], *((6, 1) if short else (30, 3)), draw)}"

    short = length < 4096 or count(build(0, False), ask.tokenizer) > length
    _, prompt = fit(lambda n: build(n, short), length, ask.tokenizer, "cwe", len(pool) - 10)
    return Example(prompt, tuple(pool[:10]), budget(ask.tokenizer, 120, pool[:10]), meta={"repeats": 6 if short else 30})


def _list(words: list[str], often: int, rarely: int, draw) -> str:
    """The task for the first ten words and the others."""
    listed = words[:10] * often + words[10:] * rarely
    draw.shuffle(listed)
    return ("Here is a numbered list of words. Some of them come up more often than others. Keep the ones in mind that come up "
            f"most often.\n{' '.join(f'{i}. {word}' for i, word in enumerate(listed, 1))}\n"
            "Question: which 10 words come up most often in the list? Answer: the 10 most frequent words are:")


def fwe(task: str, length: int, draw, ask: Ask) -> Example:
    """Frequent words: coded words whose counts follow a zeta distribution of alpha 2; the first in rank is noise."""
    size = max(length // 50, 5)
    drawn = ("".join(LETTERS[i] for i in code) for code in draw.integers(26, size=(2 * size, 6)))
    codes = list(dict.fromkeys(drawn))[:size]
    share_N = 1 / np.arange(1, len(codes) + 1)**2 / (math.pi**2 / 6)
    order = draw.integers(2**63)

    def build(n):
        text = np.repeat(["...", *codes[1:]], (n * share_N).astype(int))
        np.random.default_rng(order).shuffle(text)
        return (f"Count the coded words of the following text and find the three that come up most often. {' '.join(text)}\n"
                "Question: the dots '...' left aside, which three coded words come up most often in the text? Give nothing but "
                "the words. Answer: the three coded words that come up most often are:")

    n, prompt = fit(build, length, ask.tokenizer, "fwe")
    if int(n * share_N[3]) == int(n * share_N[4]):
        raise ConfigError(f"length {length:,} is too short for fwe: the third and the fourth word would come as often")
    return Example(prompt, tuple(codes[1:4]), budget(ask.tokenizer, 50, codes[1:4]))


def qa(task: str, length: int, draw, tokenizer, data, seed) -> Example:
    """A question, its documents, and as many others as fit, those of the same article first."""
    read, name = QA[task]
    questions, documents = read(user_files.find(data, name, task))
    order = draws(task, seed[0]).permutation(len(questions))
    for question in np.roll(order, -seed[1]):       # example i asks question i; one whose documents do not fit is passed over
        query, answers, own, near = questions[question]
        rest = draw.permutation(len(documents))
        others = list(draw.permutation(near)) + list(rest[~np.isin(rest, own + near)])
        order = draw.integers(2**63)

        def build(n):
            chosen = own + [others[i % len(others)] for i in range(n if others else 0)]
            np.random.default_rng(order).shuffle(chosen)
            text = "\n\n".join(f"Document {i}:\n{documents[d]}" for i, d in enumerate(chosen, 1))
            rule = "Answer the question from the documents. Give the answer alone, in no other words."
            return f"{rule}\n\nThese are the documents.\n\n{text}\n\n{rule}\n\nQuestion: {query} Answer:"

        if count(build(0), tokenizer) <= length:
            prompt = fit(build, length, tokenizer, task, None if others else 0)[1]
            return Example(prompt, answers, budget(tokenizer, 32, [max(answers, key=len)]))
    raise ConfigError(f"length {length:,} is too short for {task}: the documents of no question fit")


@functools.cache
def squad(path):
    """[(question, answers, [its document], [others of its article])], documents; SQuAD 2.0's unanswerable ones are left out."""
    articles = user_files.column(user_files.read(path), "data", path, list)
    places, questions = {}, []
    for article in articles:
        paragraphs = user_files.column(article, "paragraphs", path, list)
        own = [places.setdefault(user_files.column(p, "context", path, str), len(places)) for p in paragraphs]
        for paragraph, place in zip(paragraphs, own):
            for q in user_files.column(paragraph, "qas", path, list):
                answers = tuple(user_files.column(a, "text", path, str) for a in user_files.column(q, "answers", path, list))
                if answers and not q.get("is_impossible"):
                    near = sorted(set(own) - {place})
                    questions.append((user_files.column(q, "question", path, str), answers, [place], near))
    return _some(questions, path), list(places)


@functools.cache
def hotpot(path):
    """As `squad`; a question has ten documents of its own."""
    places, questions = {}, []
    for q in user_files.records(path):
        try:
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in user_files.column(q, "context", path, list)]
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: column 'context' needs [title, [sentence, ...]] for each document") from None
        own = list(dict.fromkeys(places.setdefault(text, len(places)) for text in texts))
        questions.append((user_files.column(q, "question", path, str), (user_files.column(q, "answer", path, str),), own, []))
    return _some(questions, path), list(places)


def _some(questions, path):
    if not questions:
        raise ConfigError(f"{path} holds no question that has an answer")
    return questions


QA = {"qa_1": (squad, "squad.json"), "qa_2": (hotpot, "hotpotqa.json")}
GENERATED = {**dict.fromkeys(NIAH, niah), "vt": vt, "cwe": cwe, "fwe": fwe}
TASKS = (*GENERATED, *QA)


def example(length: int, task: str, seed, ask: Ask) -> Example:
    draw = draws("ruler", length, task, seed)
    found = GENERATED[task](task, length, draw, ask) if task in GENERATED else qa(
        task, length, draw, ask.tokenizer, ask.data, seed)
    return found._replace(meta={"task": task, **found.meta})


def plan(ask: Ask):
    """Without files of the user, the eleven generated tasks."""
    rows = ask.rows or (TASKS if ask.data else tuple(GENERATED))
    for task in rows:
        if task in QA:
            user_files.find(ask.data, QA[task][1], task)
    return grid(example, (4096,), TASKS, 10)(ask._replace(rows=rows))


def score(output: str, example: Example) -> float:
    return (match_part if example.meta["task"] in QA else match_all)(output, example)


def _needle(kind: Niah, key: str, value: str) -> str:
    return f"One secret {kind.value[:-1]} for {key} is {value}."


def _new(draw, kind: str, taken: set) -> str:
    """A key or a value that was not taken."""
    while True:
        found = {"numbers": lambda: str(draw.integers(1_000_000, 10_000_000)),
                 "words": lambda: "-".join(haystack.vocabulary()[i] for i in draw.integers(len(haystack.vocabulary()), size=2)),
                 "uuids": lambda: str(uuid.UUID(bytes=draw.bytes(16), version=4))}[kind]()
        if found not in taken:
            taken.add(found)
            return found


def _spread(lines: list[str], hidden: list[str], places) -> list[str]:
    """`lines` with line i of `hidden` at places[i] (0 to 1, ascending) of them."""
    spread, at = [], 0
    for line, place in zip(hidden, places):
        to = int(place * (len(lines) + 1))
        spread += lines[at:to] + [line]
        at = to
    return spread + lines[at:]
