"""Loads local data sets for the tasks in this folder. lm-eval's `--metadata data=PATH` names the path."""
import io
from pathlib import Path

import datasets
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer  # noqa: F401 (wikitext2_local.yaml)

from mmx.config import ConfigError
from mmx.evals.user_files import column, list_jsonl, records
from mmx.files import texts


def blimp(data=None, paradigm="*", **metadata):
    """The minimal pairs in a folder of BLiMP's .jsonl files, of one paradigm or of all."""
    folder = Path(str(data))
    files = list_jsonl(folder, "" if paradigm == "*" else str(paradigm)) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"--metadata data={data} paradigm={paradigm}: no such file; data must be the folder of BLiMP's "
                          ".jsonl files, and paradigm the name of one of them (or left out)")
    return {"test": datasets.Dataset.from_list([
        {key: column(pair, key, file, str) for key in ("sentence_good", "sentence_bad")}
        for file in files for pair in records(file)])}


def wikitext(data=None, **metadata):
    """The articles of a WikiText file, split at their titles: lines such as " = Robert Boulter = "."""
    if not Path(str(data)).is_file():
        raise ConfigError(f"--metadata data={data}: data must be a file of WikiText, such as wikitext-2/test.txt")
    pages = [""]
    for line in io.StringIO(texts.read(data)):
        words = line.split()
        if words[:1] == ["="] == words[-1:] and words[1:2] != ["="]:
            pages.append("")
        pages[-1] += line
    return {"test": datasets.Dataset.from_list([{"page": page} for page in pages if page.strip()])}
