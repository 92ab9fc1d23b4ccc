"""MTOB (arXiv 2309.16575): translate with a grammar book, a word list and parallel sentences in the prompt.

The user provides MTOB's files, in --data DIR or its folders resources and splits:
  grammar_book.txt, wordlist.json ({"ek": {word: translations}, "ke": ...}), train_examples.json (original, translation),
  test_examples_ek.json and test_examples_ke.json (original, ground_truth); e is English, k the other
  language.
A prompt contains all sentences and words, and as much of the book as fits into --lengths; by default the whole book. The score
is chrF (sacrebleu). The MTOB paper scores one direction by BLEURT, which is not implemented.
"""
import functools
import importlib.util
import re

from mmx.config import ConfigError
from mmx.evals import user_files
from mmx.evals.examples import Example, PlannedExample, SuiteOptions, answer_budget, check_rows, fit_to_length
from mmx.files import texts

ROWS = {"ek": ("English", "The other language"), "ke": ("The other language", "English")}


def plan(options: SuiteOptions):
    if not importlib.util.find_spec("sacrebleu"):
        raise ConfigError("mtob needs sacrebleu, which is not installed: pip install 'mmx[eval]'")
    check_rows(options.rows, ROWS)
    find = lambda name: user_files.find(options.data, name, "mtob", ("", "resources", "splits"))
    book = texts.read_bytes(find("grammar_book.txt")).decode(errors="replace")
    lists, pairs = user_files.read(find("wordlist.json")), _pairs(find("train_examples.json"), "translation")
    planned = []
    for column in options.lengths or ("full",):
        for row in options.rows or ROWS:
            words = user_files.column(lists, row, find("wordlist.json"), dict)
            tests = _pairs(find(f"test_examples_{row}.json"), "ground_truth")
            for index, (original, truth) in enumerate(tests[:options.examples or len(tests)]):
                planned.append(PlannedExample(row, str(column), index, functools.partial(
                    _example, options, book, words, pairs, row, column, original, truth)))
    return planned


def _pairs(path, translation: str) -> list[tuple[str, str]]:
    """The sentence pairs of a file, without MTOB's canary entry."""
    return [(user_files.column(record, "original", path, str), user_files.column(record, translation, path, str))
            for record in user_files.records(path) if not any("canary" in name for name in record)]


def _example(options, book, words, pairs, row, column, original, truth) -> Example:
    from_language, to_language = ROWS[row]
    word_list = "\n".join(f"{word}: {', '.join(map(str, t)) if isinstance(t, list) else t}" for word, t in words.items())
    sentences = "\n\n".join(f"The other language: {a}\nEnglish: {b}" for a, b in pairs)
    ends = [0, *(found.end() for found in re.finditer(r"\S+\s*", book))]

    def build(n):
        return ("What follows describes a language: a grammar book, a list of words and sentences with their translations.\n\n"
                f"Grammar book:\n{book[:ends[n]]}\n\nWords, from {from_language.lower()}:\n{word_list}\n\n"
                f"Sentences:\n{sentences}\n\n"
                f"Translate this sentence as they do, on one line.\n\n{from_language}: {original}\n{to_language}:")

    taken = len(ends) - 1      # words of the book
    if column == "full":
        prompt = build(taken)
    else:
        taken, prompt = fit_to_length(build, column, options.tokenizer, "mtob", taken)
    return Example(prompt, (truth,), answer_budget(options.tokenizer, 64, [truth]), ("\n",),
                   {"book": round(taken / max(len(ends) - 1, 1), 4)})


def score(output: str, example: Example) -> float:
    """chrF of one sentence, 0 to 100."""
    import sacrebleu
    return sacrebleu.sentence_chrf(output.strip(), list(example.answers)).score


def chrf(records) -> float:
    """chrF of all sentences of a cell, taken as one corpus."""
    import sacrebleu
    return sacrebleu.corpus_chrf([r["output"].strip() for r in records], [[r["answers"][0] for r in records]]).score
