"""Our WordPiece against `BertTokenizerLegacy`, transformers' port of the original code, line by line.

    python benchmarks/tokenizer_parity.py --vocab vocab.txt --input 'text/*.txt' --lines 100000

Prints how many lines differ, and why: docs/conversion.md lists the classes. Cased or uncased goes by the vocabulary.
"""

import argparse
import collections
import fileinput
import glob
import itertools
import unicodedata

from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from bert_jax.data import tokenizer as tokenizers

NFC = 'another form in NFC'              # BertTokenizerLegacy normalises to NFC first; the original code does not
UNASSIGNED = 'unassigned'                # dropped there as control characters, kept here
NEWER = 'newer than the tables'          # punctuation or accent, assigned or reclassified since tokenizers' Unicode tables
IDEOGRAPHS = 'CJK extension E begins'    # U+2B820-U+2B91F: here not yet words of their own
FINAL_SIGMA = 'capital sigma'            # Python lowers it to a final sigma at the end of a word, Unicode's simple mapping never
WRITTEN_OUT = 'a special token written out'  # kept whole there; text like any other here and in the original code


def explain(text, lower):
    """The classes of difference that a text has reason to show; none: both must agree."""
    reasons = {_why(character, lower) for character in text} - {''}
    cleaned = ''.join(character for character in text if unicodedata.category(character)[0] != 'C')
    if not lower and unicodedata.normalize('NFC', cleaned) != cleaned:
        reasons.add(NFC)
    if any(special in text for special in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')):
        reasons.add(WRITTEN_OUT)
    return reasons


def _why(character, lower):
    category, old = unicodedata.category(character), unicodedata.ucd_3_2_0.category(character)
    if category == 'Cn':
        return UNASSIGNED
    if 0x2B820 <= ord(character) <= 0x2B91F:
        return IDEOGRAPHS
    if category != old and category[0] in 'PMCS':
        return NEWER
    if lower and character == 'Σ':
        return FINAL_SIGMA
    return ''


def both(vocab, lower=None):
    """Our tokenizer, the legacy one as a function from text to ids, and whether they lowercase."""
    ours = tokenizers.load(vocab)
    lower = ours.lowercases if lower is None else lower
    legacy = BertTokenizerLegacy(str(vocab), do_lower_case=lower)
    return ours, lambda text: legacy.convert_tokens_to_ids(legacy.tokenize(text, split_special_tokens=True)), lower


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--vocab', required=True)
    parser.add_argument('--input', required=True)
    parser.add_argument('--lines', type=int, default=100_000)
    args = parser.parse_args()
    ours, legacy, lower = both(args.vocab)
    files = sorted(glob.glob(args.input))
    if not files:
        parser.error(f'{args.input}: no such file')
    total, reasons = 0, collections.Counter()
    with fileinput.input(files, encoding='utf-8') as lines:
        for line in itertools.islice(lines, args.lines):
            line = line.rstrip('\n')
            total += 1
            if ours.encode(line) != legacy(line):
                reasons[', '.join(sorted(explain(line, lower))) or f'unexplained: {line[:200]}'] += 1
    print(f'{total:,} lines, {"uncased" if lower else "cased"}: {reasons.total()} differ')
    for reason, count in reasons.most_common():
        print(f'  {count:6}  {reason}')


if __name__ == '__main__':
    main()
