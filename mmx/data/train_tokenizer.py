"""Trains a byte-level BPE tokenizer (the package tokenizers) on the training documents of a source."""
from collections.abc import Iterator
from pathlib import Path

from mmx.config import ConfigError
from mmx.data import corpus, encoding, formats, sources
from mmx.files import atomic, notes

SPECIAL_TOKENS = "<beginning_of_sentence>", "<end_of_sentence>", "<pad>"       # the released names, and padding


def train(source: str, out: Path, vocab: int, limit: int) -> int:
    """Writes a tokenizer.json of at most `vocab` ids, and returns their number.

    Args:
      limit: reads only the first `limit` bytes of text; 0: all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sources.list_files(source)      # raises ConfigError before the training
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_texts(source, files, limit), trainer)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as file:
        file.write(tokenizer.to_str(pretty=True))
    if (count := tokenizer.get_vocab_size()) < vocab:
        notes.note(f"the text is too short for {vocab:,} token ids: {out} has {count:,}")
    return count


def _texts(source: str, files: sources.Files, limit: int) -> Iterator[str]:
    read = 0
    for path in files.paths:
        documents = corpus.all_documents() if source == "sotu" else formats.read(path, files.name(path))
        for name, content in documents:
            if corpus.split_of(name) != "train" and len(files.paths) > 1:
                continue
            for raw in encoding.texts_of(content):
                try:
                    yield raw.decode()
                except UnicodeDecodeError as error:
                    raise ConfigError(f"{name}: not UTF-8 at byte {error.start}") from None
                read += len(raw)
                if limit and read >= limit:
                    return
