"""Tokenizers of the Hugging Face hub, or in their files, through the package `tokenizers`."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lomdm_jax.data.vocabulary import MASK_TEXT, UNKNOWN_TEXT, WELL_KNOWN, Vocabulary
from lomdm_jax.errors import UserError

CONFIG_FILE = "tokenizer.json"
_SPECIAL_FILE = "special_ids.json"
_BERT_FILE = "vocab.txt"
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
# Where special tokens are named; the later file overrules.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
FILES = (CONFIG_FILE, _BERT_FILE, *_GPT2_FILES[0], *_GPT2_FILES[1], *_NAMING_FILES)
# Under which keys they are named. unk goes by well-known names only: GPT-2 names its eos there.
_KEYS = {
    "eos_id": ("eos_token", "sep_token"),
    "bos_id": ("bos_token", "cls_token"),
    "pad_id": ("pad_token",),
    "mask_id": ("mask_token",),
    "unk_id": (),
}
# What a tokenizer that does not keep a text is likely to change in it.
_PROBE = "A  b \t\r\n\n e\u0301 \ufb01 \uff21\u00a0\x00\x7f \U0010ffff\u200b\u3000 "


class HuggingFaceTokenizer(Vocabulary):
    """A tokenizer of the package `tokenizers`; no text gives its special ids.

    Text that spells a special token, such as "<|endoftext|>", is encoded like any other text.
    Byte-level tokenizers (GPT-2's kind) keep a text exactly. Of all others (BERT's loses case and
    accents) byte_lengths is None, and decode gives their own rendering of the ids.
    """

    def __init__(self, config: str, special: Mapping[str, int]) -> None:
        """Takes the content of a tokenizer.json, and eos_id, bos_id, pad_id, mask_id and unk_id,
        with -1 for one that is not there.

        Raises:
            UserError: the package `tokenizers` is missing, or cannot read the content.
        """
        self._config, self._special = config, dict(special)
        self._tokenizer = _parse(config)
        self._reserved = {i for role, i in special.items() if role != "unk_id" and i >= 0}
        self._inside = _inside(map(self._tokenizer.id_to_token, self._reserved))
        texts = self._texts()
        super().__init__(
            texts,
            fingerprint=hashlib.sha256((config + json.dumps(self._special)).encode()).hexdigest(),
            lossless=_is_byte_level(self._tokenizer) and self._keeps_probe(texts),
            **special,
        )

    def _texts(self) -> list[bytes]:
        """The bytes of every id of a byte-level tokenizer; of others, what it shows in a text."""
        added = self._tokenizer.get_added_tokens_decoder()
        silent = self._reserved | {i for i, token in added.items() if token.special}
        text_of = self._bytes if _is_byte_level(self._tokenizer) else self._rendered
        vocabulary = self._tokenizer.get_vocab()
        texts = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i not in silent:
                texts[i] = token.encode() if i in added else text_of(token)
        return texts

    def _bytes(self, token: str) -> bytes:
        return bytes(_BYTES[letter] for letter in token)

    def _rendered(self, token: str) -> bytes:
        """A token's text behind another token: " the" of BERT's "the", "ing" of its "##ing"."""
        return self._join(["a", token])[1:].encode()

    def _keeps_probe(self, texts: Sequence[bytes]) -> bool:
        return b"".join(texts[i] for i in self._ids(_PROBE)) == _PROBE.encode()

    def _join(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return decoder.decode(tokens) if decoder else " ".join(tokens)

    def _encode(self, part: str) -> list[int]:
        ids = self._ids(part)
        if self._reserved.isdisjoint(ids):
            return ids
        # A model that holds a special token as a piece (Unigram) gives it for the token's text,
        # unless that text is taken apart.
        return [token for text in self._inside.split(part) for token in self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """As for every tokenizer, but one that is not byte-level puts the pieces together its way.

        Raises:
            UserError: an id is outside 0..rows-1.
        """
        if self.byte_lengths is not None:
            return super().decode(ids)
        shown = dict.fromkeys(self._reserved, "") | {self.mask_id: MASK_TEXT}
        shown[self._special["unk_id"]] = UNKNOWN_TEXT
        tokens = [shown.get(i, self._tokenizer.id_to_token(i)) for i in self._checked(ids)]
        return self._join([token for token in tokens if token])

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and special_ids.json into the folder."""
        (Path(folder) / CONFIG_FILE).write_text(self._config, encoding="utf-8")
        (Path(folder) / _SPECIAL_FILE).write_text(json.dumps(self._special))

    def __reduce__(self) -> tuple[Any, ...]:
        """The package's own pickles forget how to treat special tokens in a text."""
        return type(self), (self._config, self._special)


def load_huggingface(path: Path) -> HuggingFaceTokenizer:
    """Reads a saved tokenizer.json, and special_ids.json beside it.

    Raises:
        OSError, ValueError: a file is missing, or cannot be read as what it should be.
    """
    special = json.loads((path.parent / _SPECIAL_FILE).read_text())
    if not isinstance(special, dict) or special.keys() != _KEYS.keys():
        raise ValueError(f"{_SPECIAL_FILE} must give {', '.join(_KEYS)}")
    return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), special)


def from_huggingface(name: str) -> HuggingFaceTokenizer:
    """Returns the tokenizer in a local folder, or of the hub if there is no such folder.

    A folder holds tokenizer.json, or BERT's vocab.txt, or GPT-2's vocab.json and merges.txt (or
    encoder.json and vocab.bpe). vocab.txt alone is read as that of bert-base-uncased; a
    tokenizer_config.json that says do_lower_case false makes it cased. Special tokens are those
    that special_tokens_map.json or tokenizer_config.json name; without these files, and for the
    hub, those of well-known names.

    Raises:
        UserError: the package is missing, or there is no such tokenizer, or it has no eos.
    """
    _package()
    folder = Path(name).expanduser()
    try:
        named = _named(folder)
        config = _folder_config(folder, named) if folder.is_dir() else _hub_config(name)
        return HuggingFaceTokenizer(config, _special_ids(_parse(config), named))
    except Exception as error:  # the package raises no narrower kind
        raise UserError(
            f"data.tokenizer 'hf:{name}' cannot be used: {error}\nGive a local folder that holds "
            "tokenizer.json, or BERT's vocab.txt, or GPT-2's vocab.json and merges.txt; or, where "
            "there is a network, the name of a tokenizer on the Hugging Face hub."
        ) from error


def is_on_hub(name: str) -> bool:
    """Whether data.tokenizer names a tokenizer of the hub: "hf:" and no local folder."""
    kind, _, place = name.partition(":")
    return kind == "hf" and bool(place) and not Path(place).expanduser().is_dir()


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "A Hugging Face tokenizer needs the package tokenizers: pip install tokenizers"
        ) from error
    return tokenizers


def _parse(config: str) -> Any:
    try:
        tokenizer = _package().Tokenizer.from_str(config)
    except Exception as error:  # the package raises no narrower kind
        raise UserError(f"{CONFIG_FILE} is not one of the package tokenizers: {error}") from error
    tokenizer.no_truncation()  # some files say that a text ends after 512 ids
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as ordinary text
    return tokenizer


def _inside(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the place after the first character of each of these texts."""
    return re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in texts))


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: printable ones stand for
    themselves, the others are counted from 256 (openai/gpt-2, src/encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are bytes in the letters of that alphabet, of which none is lacking."""
    is_bytes = isinstance(tokenizer.decoder, _package().decoders.ByteLevel)
    return is_bytes and tokenizer.get_vocab().keys() >= _BYTES.keys()


def _named(folder: Path) -> dict[str, Any]:
    """What the files of a folder say of its tokenizer; empty if there are none."""
    named: dict[str, Any] = {}
    for file in _NAMING_FILES:
        if (folder / file).exists():
            named |= json.loads((folder / file).read_text(encoding="utf-8"))
    return named


def _special_ids(tokenizer: Any, named: Mapping[str, Any]) -> dict[str, int]:
    special = {}
    for role, known in WELL_KNOWN.items():
        tokens = [_token(named[key]) for key in _KEYS[role] if named.get(key)]
        ids = map(tokenizer.token_to_id, [*tokens, *known])
        special[role] = next((i for i in ids if i is not None), -1)
    if special["eos_id"] < 0:
        raise ValueError("no token ends a document; name one, eos_token in special_tokens_map.json")
    return special


def _token(named: str | Mapping[str, str]) -> str:
    return named if isinstance(named, str) else named["content"]


def _folder_config(folder: Path, named: Mapping[str, Any]) -> str:
    """The content of a folder's tokenizer.json, or of one made from its older files."""
    if (folder / CONFIG_FILE).exists():
        return (folder / CONFIG_FILE).read_text(encoding="utf-8")
    if (folder / _BERT_FILE).exists():
        return _bert_config(folder / _BERT_FILE, named.get("do_lower_case", True))
    for vocabulary, merges in _GPT2_FILES:
        if (folder / vocabulary).exists():
            return _gpt2_config(folder / vocabulary, folder / merges)
    raise FileNotFoundError(f"{folder} holds no tokenizer.")


def _hub_config(name: str) -> str:
    return _package().Tokenizer.from_pretrained(name).to_str()


def _bert_config(vocabulary: Path, lower: bool) -> str:
    """bert-base-uncased's way (google-research/bert, tokenization.py)."""
    package = _package()
    model = package.models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]")
    tokenizer = package.Tokenizer(model)
    tokenizer.normalizer = package.normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    tokenizer.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = package.decoders.WordPiece()
    return tokenizer.to_str()


def _gpt2_config(vocabulary: Path, merges: Path) -> str:
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    return tokenizer.to_str()
