"""MTOB (arXiv 2309.16575) in its form: translate by a grammar book, a word list and parallel sentences alone.

The files are the user's, named as MTOB names them, in --data DIR or its folders resources and splits:
  grammar_book.txt, wordlist.json ({"ek": {word: translations}, "ke": ...}), train_examples.json (original, translation),
  test_examples_ek.json and test_examples_ke.json (original, ground_truth); e is English, k the language.
A prompt holds all sentences and words, and as much of the book as --lengths allow: all by default, at --lengths of the
shortest prompt none. Scored by chrF (sacrebleu); the paper scores one direction by BLEURT, which is not here.
"""
import functools
import importlib.util
import re

from mmx.config import ConfigError
from mmx.evals import user_files
from mmx.evals.examples import Ask, Example, Task, budget, check_rows, fit

ROWS = {"ek": ("English", "The other language"), "ke": ("The other language", "English")}


def plan(ask: Ask):
    if not importlib.util.find_spec("sacrebleu"):
        raise ConfigError("mtob is scored by sacrebleu, which is not installed: pip install 'mmx[eval]'")
    check_rows(ask.rows, ROWS)
    find = lambda name: user_files.find(ask.data, name, "mtob", ("", "resources", "splits"))
    book = find("grammar_book.txt").read_text(encoding="utf-8", errors="replace")
    lists, pairs = user_files.read(find("wordlist.json")), _pairs(find("train_examples.json"), "translation")
    tasks = []
    for column in ask.lengths or ("full",):
        for row in ask.rows or ROWS:
            words = user_files.column(lists, row, find("wordlist.json"), dict)
            tests = _pairs(find(f"test_examples_{row}.json"), "ground_truth")
            for index, (original, truth) in enumerate(tests[:ask.examples or len(tests)]):
                tasks.append(Task(row, str(column), index, functools.partial(
                    _example, ask, book, words, pairs, row, column, original, truth)))
    return tasks


def _pairs(path, translation: str) -> list[tuple[str, str]]:
    """The sentences of a file, without the canary that MTOB puts first."""
    return [(user_files.column(record, "original", path, str), user_files.column(record, translation, path, str))
            for record in user_files.records(path) if not any("canary" in name for name in record)]


def _example(ask, book, words, pairs, row, column, original, truth) -> Example:
    given, wanted = ROWS[row]
    listed = "\n".join(f"{word}: {', '.join(map(str, t)) if isinstance(t, list) else t}" for word, t in words.items())
    shown = "\n\n".join(f"The other language: {a}\nEnglish: {b}" for a, b in pairs)
    ends = [0, *(found.end() for found in re.finditer(r"\S+\s*", book))]

    def build(n):
        return ("What follows describes a language: a grammar book, a list of words and sentences with their translations.\n\n"
                f"Grammar book:\n{book[:ends[n]]}\n\nWords, from {given.lower()}:\n{listed}\n\nSentences:\n{shown}\n\n"
                f"Translate this sentence as they do, on one line.\n\n{given}: {original}\n{wanted}:")

    read = len(ends) - 1
    if column == "full":
        prompt = build(read)
    else:
        read, prompt = fit(build, column, ask.tokenizer, "mtob", read)
    return Example(prompt, (truth,), budget(ask.tokenizer, 64, [truth]), ("\n",),
                   {"book": round(read / max(len(ends) - 1, 1), 4)})


def score(output: str, example: Example) -> float:
    """chrF of the sentence, 0 to 100."""
    import sacrebleu
    return sacrebleu.sentence_chrf(output.strip(), list(example.answers)).score


def chrf(records) -> float:
    """chrF of all sentences of a cell as one corpus."""
    import sacrebleu
    return sacrebleu.corpus_chrf([r["output"].strip() for r in records], [[r["answers"][0] for r in records]]).score
