"""The validation and test documents of a run's sources."""
from collections.abc import Iterable

from mmx import config
from mmx.data import sources
from mmx.data.document_types import ImageText, TokenIds
from mmx.data.encoding import TEXT_ONLY, ImageOptions
from mmx.data.rows import is_generated
from mmx.data.store import cache


def validation(data: config.Data, options: ImageOptions = TEXT_ONLY) -> list[tuple]:
    """(name, content) of every validation document that a held-out loss covers: all but documents with images."""
    return _all(data, "validation", options)


def test(data: config.Data, options: ImageOptions = TEXT_ONLY) -> list[tuple]:
    """The same for the test split. May be empty: a document's name decides its split."""
    return _all(data, "test", options)


def documents(source: str, data: config.Data, split: str, options: ImageOptions = TEXT_ONLY) -> Iterable[tuple]:
    """(name, content) of the documents of one source and split without images."""
    if is_generated(source):
        return [document for document in sources.documents(source, split) if not isinstance(document[1], ImageText)]
    return cache.open_store(source, data, options).held_out(split)


def token_ids(data: config.Data, options: ImageOptions = TEXT_ONLY) -> dict[str, list]:
    """(tokens_T, targets_T) of the validation documents made of token ids, by source. Sources without any are left out."""
    found = {source: [content for _, content in documents(source, data, "validation", options) if isinstance(content, TokenIds)]
             for source in dict.fromkeys(data.sources)}
    return {source: its_ids for source, its_ids in found.items() if its_ids}


def _all(data: config.Data, split: str, options) -> list[tuple]:
    """Documents of a split. With several sources, names become SOURCE/NAME, to be unique."""
    names = dict.fromkeys(data.sources)         # a source that is listed for several lengths counts once
    return [(f"{source}/{name}" if len(names) > 1 else name, content)
            for source in names for name, content in documents(source, data, split, options)]
