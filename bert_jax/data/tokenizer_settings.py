"""What the files of a Hugging Face folder say of its tokenizer, by the rules of transformers' AutoTokenizer."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from bert_jax import cli, paths
from bert_jax.cli import UserError

OPTIONS = {'do_lower_case': True, 'strip_accents': None, 'tokenize_chinese_chars': True}  # BertTokenizer's defaults
BERT_CLASSES = ('BertTokenizer', 'DistilBertTokenizer', 'ElectraTokenizer')  # one WordPiece under several names
JSON_CLASSES = ('PreTrainedTokenizerFast', 'TokenizersBackend')  # tokenizer.json as it is


def read_settings(folder: epath.Path) -> dict[str, Any]:
    """What a Hugging Face folder says of its tokenizer, by transformers' rules of which file comes first.

    Returns:
      tokenizer_config.json and special_tokens_map.json as one; 'tokenizer_class' without 'Fast', '' where nothing
      names one and no config.json says that this is a BERT; 'added': the tokens that the folder's files add.

    Raises:
      UserError: a file that is not a JSON object; a class that is not supported.
    """
    found = {name: paths.read_json(folder / name) if (folder / name).exists() else {} for name in (
        'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'config.json')}
    for name, content in found.items():
        if not isinstance(content, dict):
            raise UserError(f'{folder / name}: a JSON object is expected, it holds a {type(content).__name__}.')
    settings, special, added, model = found.values()
    model = {} if 'model' in model else model                    # a workdir's is no word of transformers
    if 'added_tokens_decoder' not in settings:
        settings = settings | special
    default = 'BertTokenizer' if model and model.get('model_type', 'bert') == 'bert' else ''
    kind = str(settings.get('tokenizer_class') or model.get('tokenizer_class') or default)
    if kind not in JSON_CLASSES:
        kind = kind.removesuffix('Fast')
    if kind and kind not in (*BERT_CLASSES, *JSON_CLASSES):
        raise UserError(f'{folder}: its tokenizer is a {kind}, which is not supported; known: '
                        f'{", ".join((*BERT_CLASSES, *JSON_CLASSES))}.')
    tokens = [*added, *(value for key, value in settings.items() if key.endswith('_token'))]
    for key in ('added_tokens_decoder', 'additional_special_tokens', 'extra_special_tokens'):
        some = settings.get(key)
        tokens += some.values() if isinstance(some, dict) else some if isinstance(some, list) else [some]
    tokens = [token.get('content') if isinstance(token, dict) else token for token in tokens]
    return settings | {'tokenizer_class': kind, 'added': [token for token in tokens if isinstance(token, str)]}


def check_specials(file: epath.Path, settings: dict[str, Any], pieces: dict[str, str], defaults: dict[str, str]
                   ) -> None:
    """Refuses special tokens of other names than those found, and tokens that a text is searched for first.

    Args:
      file: the vocabulary.
      settings: of `read_settings`.
      pieces: role ('pad', 'cls', ...) -> the entry found for it.
      defaults: role -> the entry that transformers takes where no file names one.
    """
    for role, piece in pieces.items():
        given = settings.get(f'{role}_token') or defaults[role]
        given = given.get('content') if isinstance(given, dict) else given
        if given != piece:
            raise UserError(f'{file}: {role}_token is {given!r} for transformers (tokenizer_config.json, '
                            f'special_tokens_map.json), but {piece!r} here.')
    added = [token for token in dict.fromkeys(settings['added']) if token not in pieces.values()]
    if added:
        raise UserError(f'{file}: {", ".join(map(repr, added[:5]))} added to the vocabulary (tokenizer_config.json, '
                        'special_tokens_map.json, added_tokens.json, tokenizer.json); such tokens are matched before '
                        'all others, which is not supported.')


def read_options(path: epath.Path, pieces: Sequence[str], settings: dict[str, Any]) -> dict[str, bool | None]:
    """Of tokenizer_config.json, else BertTokenizer's; without a file of transformers, the entries tell the case."""
    capitals = any('A' <= c <= 'Z' for p in pieces if p[:1] != '[' for c in p)
    options = OPTIONS | {key: settings[key] for key in OPTIONS if key in settings}
    for key, value in options.items():
        if not isinstance(value, bool) and not (value is None and key == 'strip_accents'):
            raise UserError(f'{path}: {key} is {value!r} in tokenizer_config.json; true or false is expected.')
    if capitals and 'do_lower_case' not in settings:
        if settings['tokenizer_class'] in BERT_CLASSES:
            cli.note(f'{path}: texts are lowercased, as by transformers, though its entries have capitals; '
                     '"do_lower_case": false in tokenizer_config.json says otherwise.')
        else:
            options['do_lower_case'] = False
    return options
