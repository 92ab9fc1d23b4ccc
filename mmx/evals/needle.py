"""Needle in a haystack: one sentence in a long text, by the text's length and the sentence's depth.

The needle is the one in the evaluation of MiniMax-01 (paper figure 14), the haystack is the embedded corpus. For training there
is one more kind of example, `again`: the needle's number is repeated again and again, separated by a random number of dots.
(With a fixed number of dots, counting would be enough.) From these examples a small model learns to look back; from the depths
alone it does not, even with many more steps.
"""
from mmx.evals import haystack
from mmx.evals.examples import Example, SuiteOptions, answer_budget, fit_to_length, grid_plan, make_rng

DEPTHS = tuple(str(depth) for depth in range(0, 101, 10))       # percent of the text that comes before the needle
CITIES = ("Lisbon", "Nairobi", "Quito", "Hanoi", "Tallinn", "Adelaide", "Havana", "Kyoto", "Bergen", "Marrakesh", "Tbilisi",
          "Montevideo", "Vancouver", "Dakar", "Krakow", "Samarkand")
AGAIN = "again"     # the row for training
MAX_DOTS = 8        # between two repetitions


def plan(options: SuiteOptions):
    known = (*DEPTHS, *[AGAIN] * options.train)
    return grid_plan(example, (1024, 4096, 16384), known, 5, 100)(options._replace(rows=options.rows or DEPTHS))


def example(length: int, depth: str, seed, options: SuiteOptions) -> Example:
    rng = make_rng("needle", length, depth, seed)
    city, number = CITIES[rng.integers(len(CITIES))], str(rng.integers(1_000_000, 10_000_000))
    essay = haystack.Essay(rng, length, options.train)
    needle = f"The special magic {city} number is: {number}."
    if depth == AGAIN:
        pieces = [number + "." * dots for dots in rng.integers(1, rng.integers(2, MAX_DOTS + 2), length)]
        count, _ = fit_to_length(lambda n: " ".join([needle, *pieces[:n]]), length, options.tokenizer, AGAIN)
        return Example(needle, (" ".join(pieces[:count]),))

    def build(words):
        text = haystack.insert_at_depths(essay.take(words), [needle], [int(depth) / 100])
        return (f"There is a special magic number in this text.\n\n{text}\n\nWhat is the special magic {city} number?\n"
                f"The special magic {city} number is:")

    words, prompt = fit_to_length(build, length, options.tokenizer, "needle")
    return Example(prompt, (number,), answer_budget(options.tokenizer, 16, [number]),
                   meta={"seen": essay.uses_training_text(words)})
