"""RULER (arXiv 2404.06654): its thirteen tasks with its parameters, but prompts in our own words.

Retrieval (niah_*), variable tracking (vt) and common and frequent words (cwe, fwe) are generated. The questions of qa_1 and
qa_2 come from the user's files of SQuAD and HotpotQA, squad.json and hotpotqa.json. As in RULER, a prompt includes the
beginning of the answer, and the prompts of vt and cwe start with a worked example.
"""
import functools
import math
import uuid
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.evals import haystack, user_files
from mmx.evals.examples import (
    Example,
    SuiteOptions,
    answer_budget,
    count_tokens,
    fit_to_length,
    grid_plan,
    make_rng,
    match_all,
    match_part,
)

NOISE = "The lamp is warm. The road is long. The rain is soft. On we walk. Home and out again."
DEPTHS = np.linspace(0, 1, 40)      # of needles in an essay
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Niah(NamedTuple):
    haystack: str       # "noise": a few sentences, repeated; "essay": running text; "needles": other needles of the same form
    key: str            # "words", "numbers" or "uuids"
    value: str          # the same
    keys: int = 1
    values: int = 1     # of each key
    queries: int = 1    # keys in the question


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


def niah(task: str, length: int, rng, options: SuiteOptions) -> Example:
    kind = NIAH[task]
    used = set()
    keys = [_draw_unused(rng, kind.key, used) for _ in range(kind.keys)]
    values = [[_draw_unused(rng, kind.value, used) for _ in range(kind.values)] for _ in keys]
    needles = [_needle(kind, key, value) for key, key_values in zip(keys, values) for value in key_values]
    rng.shuffle(needles)
    queried = rng.choice(len(keys), kind.queries, replace=False)
    answers = tuple(value for key in queried for value in values[key])
    names = [keys[key] for key in queried]
    query = ", ".join(names[:-1]) + ", and " * (len(names) > 1) + names[-1]
    noun, verb, it = (kind.value, "are", "them") if len(answers) > 1 else (kind.value[:-1], "is", "it")
    some = "some" if len(answers) > 1 else "a"
    introduction = f"The text below hides {some} secret {noun}. Keep {it} in mind, for a question follows."
    question = (f"Which secret {noun} {verb} given for {query} in the text?"
                f" The secret {noun} given for {query} in the text {verb}")

    if kind.haystack == "essay":
        essay, depths = haystack.Essay(rng, length, options.train), np.sort(rng.choice(DEPTHS, len(needles), replace=False))
        context = lambda n: haystack.insert_at_depths(essay.take(n), needles, depths)
    else:
        essay, depths, others = None, np.sort(rng.random(len(needles))), []

        def context(n):
            while kind.haystack == "needles" and len(others) < n:
                others.append(_needle(kind, _draw_unused(rng, kind.key, used), _draw_unused(rng, kind.value, used)))
            return "\n".join(_insert_lines(others[:n] or [NOISE] * n, needles, depths))
    n, prompt = fit_to_length(lambda n: f"{introduction}\n{context(n)}\n{question}", length, options.tokenizer, task)
    return Example(prompt, answers, answer_budget(options.tokenizer, 128, answers),
                   meta={"seen": bool(essay and essay.uses_training_text(n))})


def vt(task: str, length: int, rng, options: SuiteOptions) -> Example:
    """Variable tracking: one chain of four hops."""
    worked, names = _chain(500, 3, rng, options.tokenizer)
    worked = f"{worked} {' '.join(names)}\n\n"
    prompt, names = _chain(length, 5, rng, options.tokenizer, worked)
    return Example(prompt, tuple(names), answer_budget(options.tokenizer, 30, names))


def _chain(length: int, letters: int, rng, tokenizer, before: str = "") -> tuple[str, list[str]]:
    """(prompt, names of the variables) of one chain; `before` comes first in the prompt."""
    names, value, depths = [], rng.integers(10_000, 100_000), np.sort(rng.random(5))
    while len(names) < 5:
        name = "".join(rng.choice(list(LETTERS.upper()), letters))
        names += [name] if name not in names else []
    lines = [f"VAR {name} = {f'VAR {names[i - 1]}' if i else value}" for i, name in enumerate(names)]

    def build(n):
        text = "\n".join(_insert_lines([NOISE] * n, lines, depths))
        return (f"{before}Follow the assignments of variables that are hidden in the following text.\n\n{text}\n"
                f"Question: which variables hold the value {value} in the text above? Answer: by the assignments in the text "
                f"above, 5 variables hold the value {value}, they are:")

    return fit_to_length(build, length, tokenizer, "vt")[1], names


def cwe(task: str, length: int, rng, options: SuiteOptions) -> Example:
    """Common words: ten words that occur 30 times among others that occur 3 times; 6 and 1 times below 4,096 tokens.

    RULER assumes tokens that are parts of words. If 30 repetitions do not fit, which happens with bytes, the words occur 6
    times and 1 time at any length.
    """
    size = length // (2 if length < 4096 else 6)        # more than fit, as a word and its number take at least two tokens
    pool, shuffle_seed = haystack.words(rng, 50 + size), rng.integers(2**63)
    worked_words, pool = pool[:40], pool[40:]

    def build(n, short):
        rng = np.random.default_rng(shuffle_seed)
        worked = _list(worked_words[:20], 3, 1, rng) if short else _list(worked_words, 10, 3, rng)
        common = " ".join(f"{i}. {word}" for i, word in enumerate(worked_words[:10], 1))
        return f"{worked} {common}\n{_list(pool[:10 + n], *((6, 1) if short else (30, 3)), rng)}"

    short = length < 4096 or count_tokens(build(0, False), options.tokenizer) > length
    _, prompt = fit_to_length(lambda n: build(n, short), length, options.tokenizer, "cwe", len(pool) - 10)
    return Example(prompt, tuple(pool[:10]), answer_budget(options.tokenizer, 120, pool[:10]),
                   meta={"repeats": 6 if short else 30})


def _list(words: list[str], often: int, rarely: int, rng) -> str:
    """The prompt in which the first ten words occur `often` times and the others `rarely` times."""
    listed = words[:10] * often + words[10:] * rarely
    rng.shuffle(listed)
    return ("Here is a numbered list of words. Some of them come up more often than others. Keep the ones in mind that come up "
            f"most often.\n{' '.join(f'{i}. {word}' for i, word in enumerate(listed, 1))}\n"
            "Question: which 10 words come up most often in the list? Answer: the 10 most frequent words are:")


def fwe(task: str, length: int, rng, options: SuiteOptions) -> Example:
    """Frequent words: coded words whose counts follow a zeta distribution with alpha 2. The most frequent one is written as
    dots, as noise."""
    size = max(length // 50, 5)
    random_codes = ("".join(LETTERS[i] for i in code) for code in rng.integers(26, size=(2 * size, 6)))
    codes = list(dict.fromkeys(random_codes))[:size]
    shares = 1 / np.arange(1, len(codes) + 1)**2 / (math.pi**2 / 6)
    shuffle_seed = rng.integers(2**63)

    def build(n):
        text = np.repeat(["...", *codes[1:]], (n * shares).astype(int))
        np.random.default_rng(shuffle_seed).shuffle(text)
        return (f"Count the coded words of the following text and find the three that come up most often. {' '.join(text)}\n"
                "Question: the dots '...' left aside, which three coded words come up most often in the text? Give nothing but "
                "the words. Answer: the three coded words that come up most often are:")

    n, prompt = fit_to_length(build, length, options.tokenizer, "fwe")
    if int(n * shares[3]) == int(n * shares[4]):
        raise ConfigError(f"length {length:,} is too short for fwe: the third and the fourth word would occur equally often")
    return Example(prompt, tuple(codes[1:4]), answer_budget(options.tokenizer, 50, codes[1:4]))


def qa(task: str, length: int, rng, tokenizer, data, seed) -> Example:
    """A question, its documents, and as many other documents as fit; documents of the same article come first."""
    read, name = QA[task]
    questions, documents = read(user_files.find(data, name, task))
    order = make_rng(task, seed[0]).permutation(len(questions))
    for question in np.roll(order, -seed[1]):       # example i asks question i; skips those whose documents do not fit
        query, answers, own, same_article = questions[question]
        rest = rng.permutation(len(documents))
        others = list(rng.permutation(same_article)) + list(rest[~np.isin(rest, own + same_article)])
        shuffle_seed = rng.integers(2**63)

        def build(n):
            chosen = own + [others[i % len(others)] for i in range(n if others else 0)]
            np.random.default_rng(shuffle_seed).shuffle(chosen)
            text = "\n\n".join(f"Document {i}:\n{documents[d]}" for i, d in enumerate(chosen, 1))
            rule = "Answer the question from the documents. Give the answer alone, in no other words."
            return f"{rule}\n\nThese are the documents.\n\n{text}\n\n{rule}\n\nQuestion: {query} Answer:"

        if count_tokens(build(0), tokenizer) <= length:
            prompt = fit_to_length(build, length, tokenizer, task, None if others else 0)[1]
            return Example(prompt, answers, answer_budget(tokenizer, 32, [max(answers, key=len)]))
    raise ConfigError(f"length {length:,} is too short for {task}: no question's documents fit")


@functools.cache
def squad(path):
    """Reads SQuAD: [(question, answers, [its document], [other documents of its article])], documents.

    SQuAD 2.0's unanswerable questions are left out.
    """
    articles = user_files.column(user_files.read(path), "data", path, list)
    indices, questions = {}, []
    for article in articles:
        paragraphs = user_files.column(article, "paragraphs", path, list)
        own = [indices.setdefault(user_files.column(p, "context", path, str), len(indices)) for p in paragraphs]
        for paragraph, index in zip(paragraphs, own):
            for q in user_files.column(paragraph, "qas", path, list):
                answers = tuple(user_files.column(a, "text", path, str) for a in user_files.column(q, "answers", path, list))
                if answers and not q.get("is_impossible"):
                    same_article = sorted(set(own) - {index})
                    questions.append((user_files.column(q, "question", path, str), answers, [index], same_article))
    return _check_any(questions, path), list(indices)


@functools.cache
def hotpot(path):
    """Reads HotpotQA, with the same result as `squad`; each question has ten documents."""
    indices, questions = {}, []
    for q in user_files.records(path):
        try:
            texts = [f"{title}\n{''.join(sentences)}" for title, sentences in user_files.column(q, "context", path, list)]
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: column 'context' must have [title, [sentence, ...]] for each document") from None
        own = list(dict.fromkeys(indices.setdefault(text, len(indices)) for text in texts))
        questions.append((user_files.column(q, "question", path, str), (user_files.column(q, "answer", path, str),), own, []))
    return _check_any(questions, path), list(indices)


def _check_any(questions, path):
    if not questions:
        raise ConfigError(f"{path} contains no question with an answer")
    return questions


QA = {"qa_1": (squad, "squad.json"), "qa_2": (hotpot, "hotpotqa.json")}
GENERATED = {**dict.fromkeys(NIAH, niah), "vt": vt, "cwe": cwe, "fwe": fwe}
TASKS = (*GENERATED, *QA)


def example(length: int, task: str, seed, options: SuiteOptions) -> Example:
    rng = make_rng("ruler", length, task, seed)
    made = GENERATED[task](task, length, rng, options) if task in GENERATED else qa(
        task, length, rng, options.tokenizer, options.data, seed)
    return made._replace(meta={"task": task, **made.meta})


def plan(options: SuiteOptions):
    """Plans all tasks, or without the user's files the eleven generated ones."""
    rows = options.rows or (TASKS if options.data else tuple(GENERATED))
    for task in rows:
        if task in QA:
            user_files.find(options.data, QA[task][1], task)
    return grid_plan(example, (4096,), TASKS, 10)(options._replace(rows=rows))


def score(output: str, example: Example) -> float:
    return (match_part if example.meta["task"] in QA else match_all)(output, example)


def _needle(kind: Niah, key: str, value: str) -> str:
    return f"One secret {kind.value[:-1]} for {key} is {value}."


def _draw_unused(rng, kind: str, used: set) -> str:
    """A random key or value that is not in `used`; adds it."""
    while True:
        found = {"numbers": lambda: str(rng.integers(1_000_000, 10_000_000)),
                 "words": lambda: "-".join(haystack.vocabulary()[i] for i in rng.integers(len(haystack.vocabulary()), size=2)),
                 "uuids": lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4))}[kind]()
        if found not in used:
            used.add(found)
            return found


def _insert_lines(lines: list[str], inserted: list[str], depths) -> list[str]:
    """`lines` with each line of `inserted` at its depth, 0 (first) to 1 (last); depths ascend."""
    result, begin = [], 0
    for line, depth in zip(inserted, depths):
        position = int(depth * (len(lines) + 1))
        result += lines[begin:position] + [line]
        begin = position
    return result + lines[begin:]
