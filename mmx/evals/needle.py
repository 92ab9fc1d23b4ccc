"""Needle in a haystack: one sentence in a long text, over the text's length and the sentence's depth.

The needle is the one that MiniMax-01 was measured with (its figure 14), the haystack the embedded corpus. To train on there is
one more row, `again`: a needle whose number comes again and again, some dots apart (were they always as many, it would be found
by counting). From that a small model learns to look back, and from the depths alone it does not in many more steps.
"""
from mmx.evals import haystack
from mmx.evals.examples import Ask, Example, budget, draws, fit, grid

DEPTHS = tuple(str(depth) for depth in range(0, 101, 10))       # percent of the text before it
CITIES = ("Lisbon", "Nairobi", "Quito", "Hanoi", "Tallinn", "Adelaide", "Havana", "Kyoto", "Bergen", "Marrakesh", "Tbilisi",
          "Montevideo", "Vancouver", "Dakar", "Krakow", "Samarkand")


AGAIN, GAP = "again", 8      # dots at most


def plan(ask: Ask):
    known = (*DEPTHS, *[AGAIN] * ask.train)
    return grid(example, (1024, 4096, 16384), known, 5, 100)(ask._replace(rows=ask.rows or DEPTHS))


def example(length: int, depth: str, seed, ask: Ask) -> Example:
    draw = draws("needle", length, depth, seed)
    city, number = CITIES[draw.integers(len(CITIES))], str(draw.integers(1_000_000, 10_000_000))
    essay = haystack.Essay(draw, length, ask.train)
    needle = f"The special magic {city} number is: {number}."
    if depth == AGAIN:
        pieces = [number + "." * gap for gap in draw.integers(1, draw.integers(2, GAP + 2), length)]
        count, _ = fit(lambda n: " ".join([needle, *pieces[:n]]), length, ask.tokenizer, AGAIN)
        return Example(needle, (" ".join(pieces[:count]),))

    def build(words):
        text = haystack.hide(essay.take(words), [needle], [int(depth) / 100])
        return (f"There is a special magic number in this text.\n\n{text}\n\nWhat is the special magic {city} number?\n"
                f"The special magic {city} number is:")

    words, prompt = fit(build, length, ask.tokenizer, "needle")
    return Example(prompt, (number,), budget(ask.tokenizer, 16, [number]), meta={"seen": essay.seen(words)})
