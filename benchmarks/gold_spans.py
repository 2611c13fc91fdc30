"""How many answers of SQuAD files come back, to the letter, from the tokens that they are trained with; lists the others.

    python benchmarks/gold_spans.py --tokenizer vocab.txt "$DATA"/squad/*.json

A question counts when the text between the first and the last token of its span is one of its answers.
"""

import argparse

from bert_jax.data import spans, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokenizer', required=True)
    parser.add_argument('files', nargs='+')
    args = parser.parse_args()
    tok, offsets, asked, lost = tokenizer.load(args.tokenizer), {}, 0, []
    for question in (question for file in args.files for question in spans.read(file) if question.answers):
        if question.passage not in offsets:
            offsets[question.passage] = tok.encode_with_offsets(question.passage)[1]
        places = offsets[question.passage]
        first, last = spans.token_span(question, places)
        begin, end = places[first][0], places[last][1]
        asked += 1
        answers = [text.strip() for text, _ in question.answers]
        if question.passage[begin:end] not in answers:
            lost.append((question.where, question.passage[begin:end], sorted(set(answers))))
    for where, found, answers in lost:
        print(f'{where}: {found!r} for {answers}: every answer begins or ends inside a word')
    print(f'{asked:,} questions with an answer, {asked - len(lost):,} recovered ({100 - 100 * len(lost) / asked:.2f} %).')


if __name__ == '__main__':
    main()
