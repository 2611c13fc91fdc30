"""How many answers of SQuAD files come back, to the letter, from their tokens; lists the others.

    python benchmarks/gold_spans.py --tokenizer vocab.txt "$DATA"/squad/*.json

Counted are the answer that a question is trained with, which is one of its whole words if there is such a one, and every
answer that some annotator gave.
"""

import argparse
import dataclasses

from bert_jax.data import tokenizer
from bert_jax.tasks import spans


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokenizer', required=True)
    parser.add_argument('files', nargs='+')
    args = parser.parse_args()
    tok, offsets, asked, untrained, cut = tokenizer.load(args.tokenizer), {}, 0, 0, 0
    for question in (question for file in args.files for question in spans.read(file) if question.answers):
        if question.passage not in offsets:
            offsets[question.passage] = tok.encode_with_offsets(question.passage)[1]
        places = offsets[question.passage]
        trained = recovered(question, places)
        each = [(answer[0], recovered(dataclasses.replace(question, answers=(answer,)), places)) for answer in question.answers]
        wrong = [(text, found) for text, found in each if found != text.strip()]
        asked += 1
        untrained += trained not in [text.strip() for text, _ in question.answers]
        cut += bool(wrong)
        for text, found in dict(wrong).items():
            print(f'{question.where}: {found!r} for {text!r}, which begins or ends inside a word; trained with {trained!r}')
    print(f'{asked:,} questions with an answer, {asked - untrained:,} recovered ({100 - 100 * untrained / asked:.2f} %); '
          f'of {cut:,} ({100 * cut / asked:.2f} %) some annotator\'s answer begins or ends inside a word.')


def recovered(question, places):
    """The passage from the first to the last token of the answer."""
    first, last = spans.token_span(question, spans.Bounds(places))
    return question.passage[places[first][0]:places[last][1]]


if __name__ == '__main__':
    main()
