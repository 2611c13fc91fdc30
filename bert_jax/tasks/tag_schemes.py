"""Tag schemes: IOB1, IOB2 and IOBES become IOB2; entities of tags of any scheme."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bert_jax.cli import UserError

TAG = re.compile(r'(?:([BIESLU])-(.+))|O')
PREFIXED = re.compile(r'([BIESLUM])[-_](.+)')
LIKE_SEQEVAL = str.maketrans('LUM', 'ESI')


def checked(where: str, tag: str) -> str:
    """A tag; refuses what is none."""
    if not TAG.fullmatch(tag):
        raise UserError(f'{where}: {tag!r} is not a tag; O, B-TYPE and I-TYPE are (and E-, S-, L-, U- of iobes); tags '
                        'without them, such as parts of speech, are not read.')
    return tag


def _parts(tags: Sequence[str]) -> Iterator[tuple[int, str, str, str, str]]:
    """(position, prefix, type, prefix before, type before) of each tag."""
    before = ('O', '')
    for at, tag in enumerate(tags):
        prefix, _, kind = tag.partition('-')
        yield at, prefix, kind, *before
        before = (prefix, kind)


def _from_iob1(tags: Sequence[str], where: Callable[[int], str]) -> Iterator[str]:
    """B- only where an entity follows another of its type."""
    for at, prefix, kind, before, kind_before in _parts(tags):
        if prefix not in 'OIB':
            raise UserError(f'{where(at)}: {tags[at]!r} is not IOB1.')
        starts = prefix == 'B' or before == 'O' or kind != kind_before
        yield 'O' if prefix == 'O' else f'{"B" if starts else "I"}-{kind}'


def _from_iob2(tags: Sequence[str], where: Callable[[int], str]) -> Iterator[str]:
    """B- at every entity's first word."""
    for at, prefix, kind, before, kind_before in _parts(tags):
        if prefix not in 'OIB' or (prefix == 'I' and (before == 'O' or kind != kind_before)):
            likely = 'IOB1 (scheme=iob1)' if prefix == 'I' else 'IOBES (scheme=iobes)'
            raise UserError(f'{where(at)}: {tags[at]!r} is not IOB2 after {tags[at - 1] if at else "nothing"!r}; '
                            f'is the file {likely}?')
        yield tags[at]


def _from_iobes(tags: Sequence[str], where: Callable[[int], str]) -> Iterator[str]:
    """E- (L-) at an entity's last word, S- (U-) at its only one."""
    for at, prefix, kind, before, kind_before in _parts([*tags, 'O']):
        goes_on = before in 'BI'
        if (prefix in 'IEL') != goes_on or (goes_on and kind != kind_before):
            here = repr(tags[at]) if at < len(tags) else "the sentence's end"
            raise UserError(f'{where(min(at, len(tags) - 1))}: {here} is not IOBES after '
                            f'{tags[at - 1] if at else "nothing"!r}.')
        if at < len(tags):
            yield 'O' if prefix == 'O' else f'{"B" if prefix in "BSU" else "I"}-{kind}'


def entities(words: Sequence[str], tags: Sequence[str], labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Entities as seqeval (conlleval) reads them, of any scheme: IOB1, IOB2, IOBES, BILOU, BMES, also broken ones.

    Where no label begins with B or I and some have no prefix, runs of equal type are entities. Labels without a prefix
    are types of their own where there is an O (X next to B- and I-); else (parts of speech, LABEL_0) they are none.

    Args:
      words, tags: of one sentence.
      labels: all that there are; those of the sentence if not given.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    labels = set(labels or tags)
    prefixed = {label for label in labels if PREFIXED.fullmatch(label)}
    if not (prefixed == labels - {'O'} or any(label[0] in 'BI' for label in prefixed)):
        prefixed = set()  # E_MAIL and PHONE is a type

    def like_seqeval(tag: str) -> str:
        if tag in prefixed:
            return f'{tag[0].translate(LIKE_SEQEVAL)}-{tag[2:]}'
        return f'I-{tag}' if tag != 'O' and 'O' in labels else 'O'

    return [{'type': kind, 'begin': begin, 'end': end + 1, 'text': ' '.join(words[begin:end + 1])}
            for kind, begin, end in get_entities([*map(like_seqeval, tags)])]


SCHEMES = {'iob1': _from_iob1, 'iob2': _from_iob2, 'iobes': _from_iobes}
