"""The long-context suites with functions in place of a model: one solves each task by a rule, one ignores the text."""
import collections
import importlib.util
import json
import re

import numpy as np
import pytest
import tokenizers

from mmx.config import ConfigError
from mmx.data import sources, tokens
from mmx.evals import examples, haystack, longbench, mqar, mr_niah, needle, ruler, runner
from mmx.evals.examples import SuiteOptions
from mmx.evals.runner import ModelInterface, run
from mmx.evals.suites import SUITES

BYTES = tokens.tokenizer("bytes")
TEXT = [name for name in SUITES if name != "vision"]        # which needs a model with vision
UNITS = {       # a prompt may be shorter than its length by less than this: the largest unit of text, in bytes
    "needle": 30, "mr-niah": 60, "position": 1, "mqar": 1, "niah_single_1": 90, "niah_single_2": 30, "niah_single_3": 30,
    "niah_multikey_1": 30, "niah_multikey_2": 70, "niah_multikey_3": 110, "niah_multivalue": 30, "niah_multiquery": 30,
    "vt": 90, "cwe": 55, "fwe": 60, "qa_1": 60, "qa_2": 600}


def niah(prompt):
    names = re.search(r"given for ([^?]*) in the text\?", prompt)[1]
    return " ".join(value for name in re.split(", and |, ", names)
                    for value in re.findall(rf"One secret \w+ for {name} is ([\w-]+)\.", prompt))


def variables(prompt):
    text, question = prompt.rsplit("\nQuestion", 1)
    value = re.search(r"hold the value (\d+)", question)[1]
    found = []
    for name, of in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text.rsplit("Follow the", 1)[1]):
        found += [name] if of == value or of in found else []
    return ", ".join(found)


def common(prompt):
    words = re.findall(r"\d+\. ([\w-]+)", prompt.rsplit("most often.\n", 1)[1].split("\n")[0])
    return " ".join(word for word, _ in collections.Counter(words).most_common(10))


def frequent(prompt):
    words = re.findall(r"\b[a-z]{6}\b", prompt.split("come up most often. ")[1].split("\nQuestion")[0])
    return " ".join(word for word, _ in collections.Counter(words).most_common(3))


def capital(prompt):
    name = re.findall(r"capital of (\w+)\?", prompt)[-1]
    return re.search(rf"capital of {name} is (\w+)\.", prompt)[1]


def repeat(prompt):
    turns = re.split(r"(?:^|\n)(?:User|Assistant): ?", prompt)[1:]
    asked = turns[-2] if prompt.endswith("Assistant:") and not turns[-1] else turns[-1]
    place, kind, subject = re.search(r"the (first|second) (poem|description|list).* (?:about|of|for) (.*)\.", asked).groups()
    verb = {"poem": "Write", "description": "Describe", "list": "Name"}[kind]
    found = [turns[i + 1] for i in range(0, len(turns) - 2, 2) if turns[i].startswith(verb) and subject in turns[i]]
    return found[place == "second"]


def magic(prompt):
    city = re.search(r"special magic (.*) number\?", prompt)[1]
    return re.search(rf"The special magic {city} number is: (\d+)\.", prompt)[1]


def chosen(prompt):
    fact = re.search(r"The fact is (\w+)\.", prompt)
    return f"The correct answer is **({re.search(rf'[(]([A-D])[)] {fact[1]}', prompt)[1]})**" if fact else ""


def translated(prompt):
    listed = dict(re.findall(r"^(\w+): (\w+)", prompt.split("Words, from")[1].split("Sentences:")[0], re.M))
    return " ".join(listed[word] for word in prompt.rsplit("\n", 2)[1].split(": ")[1].split())


BY_RULE = {"needle": magic, "mr-niah": repeat, "vt": variables, "cwe": common, "fwe": frequent, "qa_1": capital,
           "qa_2": capital, "longbench2": chosen, "mtob": translated, **dict.fromkeys(ruler.NIAH, niah)}


def associated(ids_T, _):
    """The token that followed the first occurrence of each token."""
    first = {}
    for at, token in enumerate(ids_T[:-1]):
        first.setdefault(token, ids_T[at + 1])
    return np.zeros(len(ids_T)), np.array([first.get(token, 0) for token in ids_T])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A user's files: 40 questions; each choice, A to D, is the answer to ten."""
    folder = tmp_path_factory.mktemp("data")
    lands = [f"Land{chr(97 + i)}{chr(97 + j)}" for i in range(5) for j in range(8)]
    facts = [(land, f"City{land[4:]}", f"The capital of {land} is City{land[4:]}.") for land in lands]
    squad = [{"paragraphs": [{"context": text, "qas": [
        {"question": f"What is the capital of {land}?", "answers": [{"text": city}], "is_impossible": False},
        {"question": "What is it?", "answers": [], "is_impossible": True}]}]} for land, city, text in facts]
    hotpot = [{"question": f"What is the capital of {land}?", "answer": city,
               "context": [[land, [text]], *([f"{land} {n}", ["Nothing of note. "] * 3] for n in range(9))]}
              for land, city, text in facts]
    longbench = [{"question": "Which?", "context": "So. The fact is red. " + "More. " * 90, "answer": "ABCD"[n % 4],
                  "difficulty": ("easy", "hard")[n // 4 % 2], "length": ("short", "medium", "long")[n % 3],
                  **{f"choice_{letter}": "red" if letter == "ABCD"[n % 4] else "blue" for letter in "ABCD"}} for n in range(40)]
    canary = {"big-bench-canary": "a mark"}
    files = {
        "squad.json": {"data": squad}, "hotpotqa.json": hotpot, "data.json": longbench,
        "wordlist.json": {"ek": {"dog": ["kabi"], "sees": "mara", "water": ["tuo", "to"]},
                          "ke": {"kabi": ["dog", "n"], "mara": ["sees"], "tuo": ["water"]}},
        "train_examples.json": [canary, {"original": "kabi mara", "translation": "the dog sees"}],
        "test_examples_ek.json": [canary, {"original": "dog sees water", "ground_truth": "kabi mara tuo"}] * 2,
        "test_examples_ke.json": [canary, {"original": "tuo mara", "ground_truth": "water sees"}]}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "grammar_book.txt").write_text("The verb comes last. " * 200)
    released = []
    for label, which in (("Red as fire,\nsoft as snow.", "first"), ("1. Oak\n2. Elm", "second")):
        released += [{"label": label, "length_class": 2048, "messages": [
            {"role": "user", "content": "A poem"}, {"role": "assistant", "content": label},
            {"role": "user", "content": f"Please repeat the {which} one"}]}] * 3
    (folder / "released").mkdir()
    (folder / "released" / "2048_tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in released))
    return folder


def options_for(name, data, **more):
    lengths = {"mtob": (), "longbench2": ()}.get(name, (4096,))
    return SuiteOptions(BYTES, **{"lengths": lengths, "data": data if name in ("ruler", "mtob", "longbench2") else None,
                         "examples": 3, **more})


def made(name, data, **more):
    return [(task, task.make()) for task in SUITES[name].plan(options_for(name, data, **more))]


@pytest.mark.parametrize("name", TEXT)
def test_the_same_seed_gives_the_same_examples(name, data):
    def texts(seed):
        return [(task[:3], str(list(e.prompt)), list(e.answers), e.meta) for task, e in made(name, data, seed=seed)]
    first = texts(0)
    generated = name not in ("mtob", "longbench2")
    assert texts(0) == first and (texts(1) != first) == generated
    if generated:       # an example does not depend on what else is asked for
        fewer = [(t[:3], str(list(e.prompt)), list(e.answers), e.meta) for t, e in made(name, data, examples=1)]
        assert all(one in first for one in fewer) and 3 * len(fewer) == len(first) == len({prompt for _, prompt, _, _ in first})


@pytest.mark.parametrize("name", TEXT)
def test_a_rule_is_always_right_and_a_blind_guess_at_chance_level(name, data, tmp_path):
    rows = {example.prompt: task.row for task, example in made(name, data, examples=10)} if name == "ruler" else {}

    def solve(prompt, steps, stop):
        output = BY_RULE[rows.get(prompt, name)](prompt)
        assert len(output.encode()) <= steps, "too few steps for the answer"
        return output

    sure = lambda ids_T, next_T: (np.zeros(len(ids_T)), associated(ids_T, next_T)[1])
    best = run(name, options_for(name, data, examples=10), ModelInterface(solve, sure), tmp_path / "best", {})
    perfect = {"accuracy": 1, "chrF": 100, "perplexity": 1}[SUITES[name].unit]
    assert all(score == pytest.approx(perfect) for cells in best["scores"].values() for score in cells.values())
    assert best["score"] == pytest.approx(perfect)

    chance = {"longbench2": 0.25, "mqar": 1 / 128, "position": 264}.get(name, 0)
    draw = np.random.default_rng(0)
    guess = lambda prompt, steps, stop: "The correct answer is A" if name == "longbench2" else prompt.rsplit("\n", 1)[-1]
    blind = ModelInterface(guess, lambda ids_T, next_T: (np.full(len(ids_T), np.log(264)), draw.integers(128, 256, len(ids_T))))
    worst = run(name, options_for(name, data, examples=10), blind, tmp_path / "blind", {})
    assert worst["score"] == pytest.approx(chance, abs=12 if name == "mtob" else 0.03)       # chrF gives points for any letter


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer that splits a text into words and punctuation; all of them are unknown tokens."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["</s>"])
    model.save(str(path))
    return tokens.tokenizer(str(path))


@pytest.mark.parametrize("name", [name for name in TEXT if name not in ("mtob", "longbench2", "mqar")])
def test_prompts_have_the_length_asked_for(name, data, words):
    for tokenizer, lengths in ((BYTES, (3000, 4096, 9000)), (words, (1000, 5000))):
        for task in SUITES[name].plan(options_for(name, data, examples=2, lengths=lengths)._replace(tokenizer=tokenizer)):
            prompt = task.make().prompt
            size = examples.count_tokens(prompt, tokenizer) if isinstance(prompt, str) else len(prompt)
            unit = UNITS[task.row if name == "ruler" else name]
            assert int(task.column) - unit < size <= int(task.column), task


def test_fit_builds_few_prompts_and_finds_the_boundary():
    draw = np.random.default_rng(0)
    for length, sizes in ((10**6, draw.integers(1, 12, 10**6)), (10**5, np.r_[[1] * 20_000, [500] * 1000]), (50, [7] * 20)):
        ends, built = np.r_[0, np.cumsum(sizes)], []
        n, text = examples.fit_to_length(lambda n: built.append(n) or "x" * (9 + ends[n]), length, BYTES, "x", len(sizes))
        assert len(text) + 1 <= length < 10 + ends[n + 1] and len(built) < 40
    found = [examples.fit_to_length(lambda n: "x" * n, 99, BYTES, "x", most)[0] for most in (0, 1, 5, 98, 99, 200)]
    assert found == [0, 1, 5, 98, 98, 98]
    with pytest.raises(ConfigError, match="length 9 is too short for x, whose shortest prompt has 11 tokens"):
        examples.fit_to_length(lambda n: "x" * (n + 10), 9, BYTES, "x")
    with pytest.raises(ConfigError, match="the tokenizer does not split the text: it makes 2 tokens of"):
        examples.fit_to_length(lambda n: "x", 9, BYTES, "x")


def written(path, name, **asked):
    """Writes a suite's examples and returns the documents that training reads, in the file's order."""
    count = runner.write_examples(name, path, **{"examples": 4, **asked})
    found = [d for part in ("train", "validation", "test") for d in sources.documents(str(path), part)]
    assert len(found) == count
    return [content for _, content in sorted(found, key=lambda d: int(d[0].split(":")[1]))]


def test_a_file_is_kept_if_writing_fails(tmp_path):
    (tmp_path / "a.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match="too short"):
        runner.write_examples("needle", tmp_path / "a.jsonl", lengths=(1000, 30), examples=1)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.jsonl", "kept")]


@pytest.mark.parametrize("name", ["needle", "mr-niah", *ruler.NIAH, "vt", "cwe", "fwe"])
def test_training_examples_are_solved_by_the_rule(name, tmp_path):
    suite, rows = ("ruler", (name,)) if name not in SUITES else (name, ())
    for prompt, completion in written(tmp_path / "a.jsonl", suite, rows=rows, lengths=(3000,)):
        found = BY_RULE[name](prompt.decode())
        found = mr_niah.components(found) if name == "mr-niah" else re.split(", | ", found)
        assert sorted(completion.decode().removeprefix(" ").split(", ")) == sorted(found)


def test_training_examples_depend_on_the_seed_only_and_differ_from_evaluation(tmp_path):
    first, second, other = (written(tmp_path / f"{n}.jsonl", "needle", lengths=(600,), seed=seed)
                            for n, seed in enumerate((0, 0, 1)))
    assert first == second and not set(first) & set(other)
    asked = options_for("needle", None, lengths=(600,), examples=4)
    evaluated = [task.make() for task in SUITES["needle"].plan(asked)]
    assert not {e.answers[0] for e in evaluated} & {completion.decode()[1:] for _, completion in first}
    train, held_out = (" ".join(haystack._words(*parts)) for parts in (("train",), ("test", "validation")))
    for prompt, _ in first:
        before, after = re.split(r" ?The special magic \w+ number is: \d+\. ?", prompt.decode().split("\n\n")[1])
        longest = max(before, after, key=len)
        assert longest in train and longest not in held_out


def test_the_row_again_is_for_training_only(tmp_path):
    gaps = set()
    for prompt, completion in written(tmp_path / "a.jsonl", "needle", rows=("again",), lengths=(256,), examples=20):
        number = re.fullmatch(rb"The special magic \w+ number is: (\d{7})\.", prompt)[1]
        repeats = re.findall(rb" (\d+)(\.+)", completion)
        assert {one for one, _ in repeats} == {number} and len(repeats) > 9 and len(prompt + completion) + 1 <= 256
        gaps |= {len(dots) for _, dots in repeats}
    assert gaps == set(range(1, 9))
    with pytest.raises(ConfigError, match="--rows: there is no row 'again'"):
        made("needle", None, rows=("again",))
    with pytest.raises(ConfigError, match="mtob is for evaluation only"):
        runner.write_examples("mtob", tmp_path / "b.jsonl")


def test_mqar_is_written_as_ids_with_their_targets(tmp_path):
    for ids_T, targets_T in written(tmp_path / "a.jsonl", "mqar", rows=("16",), lengths=(128,)):
        asked_T = targets_T >= 0
        assert len(ids_T) == 128 and asked_T.sum() == 16
        np.testing.assert_array_equal(associated(ids_T, None)[1][asked_T], targets_T[asked_T])


def test_depth_is_where_the_needle_is():
    for depth in (0, 30, 50, 100):
        found = needle.example(20_000, str(depth), (0, 0), SuiteOptions(BYTES))
        text = found.prompt.split("\n\n")[1]
        assert 100 * text.index("The special magic") / len(text) == pytest.approx(depth, abs=3)


def test_text_of_the_training_split_is_marked():
    held_out = haystack._words("test", "validation")
    found = needle.example(1_300_000, "70", (0, 0), SuiteOptions(BYTES))         # the held-out files are 1.04 MB
    assert found.meta["seen"] and magic(found.prompt) == found.answers[0]
    assert not needle.example(900_000, "70", (0, 1), SuiteOptions(BYTES)).meta["seen"]
    essay = haystack.Essay(examples.make_rng(0), 10**9)
    assert essay.take(len(held_out)) == held_out and not essay.uses_training_text(len(held_out))
    assert essay.uses_training_text(len(held_out) + 1)
    every = len(held_out) + len(haystack._words("train"))
    assert essay.take(every + 5)[-5:] == held_out[:5]       # then the text starts again


def test_ruler_has_its_parameters():
    def shape(task, length=8192):
        return ruler.example(length, task, (0, 0), SuiteOptions(BYTES))
    keys = lambda e: len(set(re.findall(r"One secret \w+ for ([\w-]+) is", e.prompt)))
    values = lambda e: len(re.findall(r"One secret \w+ for", e.prompt))
    counts = {task: (keys(shape(task)), values(shape(task)), len(shape(task).answers)) for task in ruler.NIAH}
    assert counts["niah_single_1"] == counts["niah_single_2"] == counts["niah_single_3"] == (1, 1, 1)
    assert counts["niah_multikey_1"] == (4, 4, 1) and counts["niah_multivalue"] == (1, 4, 4)
    assert counts["niah_multiquery"] == (4, 4, 4)
    assert min(counts[f"niah_multikey_{n}"][0] for n in (2, 3)) > 50       # the haystack consists of needles
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", shape("niah_multikey_3").answers[0])
    assert re.fullmatch(r"\d{7}", shape("niah_multikey_2").answers[0])
    assert len(shape("vt").answers) == 5 and all(re.fullmatch("[A-Z]{5}", name) for name in shape("vt").answers)
    for length, often, rarely in ((8192, 30, 3), (3000, 6, 1), (4096, 6, 1)):
        listed = shape("cwe", length).prompt.rsplit("most often.\n", 1)[1].split("\n")[0]
        counted = collections.Counter(re.findall(r"\d+\. ([\w-]+)", listed))
        assert sorted(counted.values(), reverse=True)[:11] == [often] * 10 + [rarely]
    counted = collections.Counter(shape("fwe", 50_000).prompt.split("most often. ")[1].split("\nQuestion")[0].split())
    ranks = [number for _, number in counted.most_common(5)]
    assert ranks == pytest.approx([ranks[0] / n**2 for n in (1, 2, 3, 4, 5)], abs=1)         # zeta with alpha 2


def test_mqar_follows_zoology():
    found = mqar.example(65, "16", (0, 0), SuiteOptions(BYTES))
    asked = np.flatnonzero(found.answers >= 0)
    keys, values = found.prompt[1:33:2], found.prompt[2:34:2]
    assert len(found.prompt) == 65 and found.prompt[0] == 256 and len(asked) == 16 and asked.min() >= 33
    assert len(set(keys)) == len(set(values)) == 16 and max(keys) < 128 <= min(values)
    assert dict(zip(found.prompt[asked], found.answers[asked])) == dict(zip(keys, values))
    with pytest.raises(ConfigError, match="16 pairs need 65 tokens, length 64 is too short"):
        mqar.example(64, "16", (0, 0), SuiteOptions(BYTES))
    with pytest.raises(ConfigError, match="--rows 200 must be between 1 and 128 pairs"):
        mqar.example(2000, "200", (0, 0), SuiteOptions(BYTES))


def test_dialogues_ask_for_one_of_two_equal_requests():
    for depth, place in (("25", "first"), ("50", "second"), ("75", "second")):
        found = mr_niah.example(20_000, depth, (0, 0), SuiteOptions(BYTES))
        assert f"Please repeat the {place}" in found.prompt.rsplit("\n", 2)[1]
        at = found.prompt.index(found.answers[0])
        assert 100 * at / len(found.prompt) == pytest.approx(int(depth), abs=5)
        assert all(found.prompt.count(answer) == 1 for answer in found.answers)


@pytest.mark.parametrize("label, parts", [
    ("1. Oak\n2. Elm tree\n3. Ash", ["Oak", "Elm tree", "Ash"]),
    ("Wide and grey, gulls calling, home of ships.", ["Wide and grey", "gulls calling", "home of ships"]),
    ("Frogs croak, one and all.\nIn the reeds, a boat rests.", ["Frogs croak, one and all", "In the reeds, a boat rests"]),
    ("On the pond's edge,\nHerons stand still.", ["On the pond's edge", "Herons stand still"]),
    ("身披黑衣，步伐缓慢，\n在风中，它们微笑。", ["身披黑衣", "步伐缓慢", "在风中", "它们微笑"]),
    ("蛙声阵阵，此起彼伏。\n树下，有人下棋。", ["蛙声阵阵，此起彼伏", "树下，有人下棋"]),
])
def test_labels_are_split_into_components(label, parts):
    assert mr_niah.components(label) == parts


def test_released_dialogues_are_read_and_scored(data):
    tasks = SUITES["mr-niah"].plan(SuiteOptions(BYTES, data=data / "released"))
    assert [task[:3] for task in tasks] == [(depth, "2048", index) for index in (0, 1) for depth in ("25", "50", "75")]
    found = tasks[0].make()
    assert found.prompt.startswith("User: A poem\nAssistant: Red as fire,\nsoft as snow.\nUser: Please")
    assert found.prompt.endswith("\nAssistant:") and found.answers == ("Red as fire", "soft as snow")
    scores = [mr_niah.score(said, found) for said in ("Red as fire, soft as snow", "soft as snow", "Sorry: Red as fire", "")]
    assert scores == [1, 0.5, 0, 0]
    options = SuiteOptions(BYTES, data=data / "released", rows=("25",), examples=1, lengths=(2048,))
    assert len(SUITES["mr-niah"].plan(options)) == 1


@pytest.mark.parametrize("output, letter", [
    ("The correct answer is (B)", "B"), ("The correct answer is **C**.", "C"), ("The correct answer is (A), not (B)", "A"),
    ("(D)", None), ("the correct answer is (A)", None), ("The correct answer is A or The correct answer is (D)", "D")])
def test_longbench_answers_are_extracted_by_its_rule(output, letter):
    assert longbench.extract(output) == letter


def test_longbench_prompts_lose_their_middle(data, words):
    (_, whole), *_ = made("longbench2", data)
    for tokenizer in (BYTES, words):
        text = whole.prompt if tokenizer is BYTES else "x " * 900
        cut = longbench.remove_middle(text, 400, tokenizer)
        assert examples.count_tokens(cut, tokenizer) <= 400
    options = SuiteOptions(BYTES, data=data / "data.json", context=400)
    found = next(iter(SUITES["longbench2"].plan(options))).make()
    assert examples.count_tokens(found.prompt, BYTES) == 399 and found.meta["cut"] and not whole.meta["cut"]
    assert found.prompt[:199] == whole.prompt[:199] and found.prompt[-199:] == whole.prompt[-199:]
    shortened = longbench.remove_middle("é" * 900, 400, BYTES)      # 199 bytes end in the middle of an é
    assert examples.count_tokens(shortened, BYTES) <= 400


def test_mtob_uses_as_much_of_the_book_as_fits(data):
    books = [(len(e.prompt), e.meta["book"]) for task, e in made("mtob", data, lengths=(1200, 2000), rows=("ke",))]
    books += [(len(e.prompt), e.meta["book"]) for task, e in made("mtob", data, rows=("ke",))]
    assert 1190 < books[0][0] < 1200 and 1990 < books[1][0] < 2000 and books[2][0] > 4500
    assert 0 < books[0][1] < books[1][1] < books[2][1] == 1


def test_lengths():
    formatted = [examples.format_length(str(n)) for n in (512, 1024, 1536, 4 * 1024**2, 10**6)]
    assert formatted == ["512", "1k", "1536", "4m", "1000000"]


@pytest.mark.parametrize("name, broken, message", [
    ("ruler", None, "qa_1 needs your file squad.json: give its folder as --data DIR"),
    ("ruler", {"squad.json": None}, "qa_1: there is no file "),
    ("ruler", {"squad.json": {"rows": []}}, "squad.json: an entry lacks the column 'data' (list)"),
    ("ruler", {"squad.json": {"data": [{"paragraphs": [{"context": "a"}]}]}}, "squad.json: an entry lacks the column 'qas'"),
    ("ruler", {"squad.json": {"data": []}}, "squad.json contains no question with an answer"),
    ("ruler", {"hotpotqa.json": {"data": 1}}, "hotpotqa.json must contain an array of objects, this is dict"),
    ("ruler", {"hotpotqa.json": [{"question": "a", "context": []}]}, "an entry lacks the column 'answer' (str)"),
    ("mtob", {"wordlist.json": {"ek": {}}}, "wordlist.json: an entry lacks the column 'ke' (dict)"),
    ("mtob", {"test_examples_ek.json": [{"original": "a"}]}, "test_examples_ek.json: an entry lacks the column 'ground_truth'"),
    ("mtob", {"grammar_book.txt": None}, "mtob: there is no file "),
    ("ruler", {"hotpotqa.json": [{"context": [["a"]]}]}, "column 'context' must have [title, [sentence, ...]]"),
    ("mtob", {"test_examples_ek.json": [{"original": 3}]}, "test_examples_ek.json: an entry lacks the column 'original' (str)"),
    ("mtob", {"test_examples_ek.json": '[{"original": "\\ud800"}]'}, "column 'original' is not valid text"),
    ("mr-niah", {"a.jsonl": b"\xff"}, "a.jsonl:1 is not JSON ("),
    ("longbench2", {"data.json": "{"}, "data.json is not JSON ("),
    ("longbench2", {"data.json": [{"question": "a"}]}, "entry 1: an entry lacks the column 'choice_A' (str)"),
    ("longbench2", {"data.json": ["a"]}, "data.json: each entry must be an object, this one is str"),
    ("longbench2", {}, "column 'difficulty' is 'fair', but must be one of easy, hard"),
    ("mr-niah", {"a.jsonl": '{"label": "a"}\n'}, "a.jsonl:1: an entry lacks the column 'messages' (list)"),
    ("mr-niah", {"a.jsonl": "{}\n{"}, "a.jsonl:2 is not JSON ("),
    ("mr-niah", {}, "mr-niah: no .jsonl file in --data "),
])
def test_errors_in_the_users_files_are_named(name, broken, message, data, tmp_path):
    for path in data.glob("*.*") if name != "mr-niah" else ():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if "difficulty" in message:
        broken = {"data.json": [{**json.loads((data / "data.json").read_text())[0], "difficulty": "fair"}]}
    for file, content in (broken or {}).items():
        if content is None:
            (tmp_path / file).unlink()
        else:
            content = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = {"ruler": ("qa_1", "qa_2")}.get(name, ())
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        for task in SUITES[name].plan(SuiteOptions(BYTES, data=None if broken is None else tmp_path, rows=rows)):
            task.make()
    assert "\n" not in str(error.value)


def test_unknown_rows():
    for name, row, message in (("ruler", "niah_singl_1", "did you mean niah_single_1?"), ("needle", "101", "known: 0, 10"),
                               ("mr-niah", "30", "known: 25, 50, 75"), ("mqar", "many", "known: 4, 16, 64")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            list(SUITES[name].plan(SuiteOptions(BYTES, rows=(row,))))
    assert {task.row for task in SUITES["needle"].plan(SuiteOptions(BYTES, rows=("33", "50")))} == {"33", "50"}


def test_a_missing_package_is_named_with_its_extra(monkeypatch, data):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("sacrebleu, which is not installed: pip install 'mmx[eval]'")):
        SUITES["mtob"].plan(SuiteOptions(BYTES, data=data))
