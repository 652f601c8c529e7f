"""A tokenizer's folder, loaded: text to ids and back.

    tokenizers/<key>/
      tokenizer.model         sentencepiece's model; what encodes, if it is there
      vocab.txt               BERT's WordPiece vocabulary, if the tokenizer was made from one
      tokenizer.json          for transformers; what encodes, if there is no tokenizer.model
      tokenizer_config.json   lets transformers.AutoTokenizer load the folder

Trained models have the special tokens at the ids 0 to 4; one that is given may
have them anywhere. [SEP] ends every document on disk.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from data_shards.errors import DamagedDataError, DataSettingError
from data_shards.special import NAMES, SpecialIds
from data_shards.word_cache import EncodeBatch, WordCache, bert_words, words

MODEL_NAME, VOCABULARY_NAME, LIBRARY_NAME = "tokenizer.model", "vocab.txt", "tokenizer.json"

_MARKS = ("Mn", "Mc", "Me", "Cf")

_OTHER_NAMES = {
    "[PAD]": ("<pad>",), "[UNK]": ("<unk>",), "[CLS]": ("<cls>", "<s>"), "[SEP]": ("<sep>", "</s>"),
    "[MASK]": ("<mask>",),
}  # fmt: skip

# Tables of sentencepiece's own: in none does a rule reach across a space, and ▁ in a text is a space as well.
NFKC_RULES = ("nmt_nfkc", "nmt_nfkc_cf")

# Oniguruma's tables are newer than those of the library's BertNormalizer and BertPreTokenizer, from which
# newer marks and punctuation, and 256 Chinese characters, are missing.
_DROPPED, _ACCENT = r"[\p{Cf}\p{Cn}]", r"\p{Mn}"
_BERT_PUNCTUATION = r"[\p{P}$+<=>^`|~\x{2B820}-\x{2B91F}]"

# Google's tokenizer lower-cases with Python, which writes a sigma that ends a word as ς.
_CASED = r"[\p{Cased}&&[^\p{Case_Ignorable}]]"
_CASED_BEFORE = "|".join(_CASED + r"\p{Case_Ignorable}" * between for between in range(8))
_FINAL_SIGMA = rf"(?<={_CASED_BEFORE})Σ(?!\p{{Case_Ignorable}}*{_CASED})"


class Tokenizer:
    """A tokenizer's folder, loaded.

    Attributes:
        folder: Where it lies.
        digest: SHA-256 of what encodes; shards carry it.
        special: Ids of the special tokens.
        vocab_size: Number of ids, special tokens included.
    """

    def __init__(self, folder: str | Path, word_cache: bool = True):
        """Loads a folder that ``install`` made.

        Args:
            folder: The folder, or a file in it.
            word_cache: Whether to encode each word once where that gives the library's own ids.

        Raises:
            DamagedDataError: A file in it cannot be read.
            DataSettingError: Nothing there, or a special token is missing.
        """
        folder = Path(folder)
        self.folder = folder.parent if folder.is_file() else folder
        model, library = self.folder / MODEL_NAME, self.folder / LIBRARY_NAME
        defining = model if model.exists() else library
        if not defining.exists():
            raise DataSettingError(f"{folder}: no tokenizer here (no {MODEL_NAME}, no {LIBRARY_NAME}); run tokenize")
        self.digest = hashlib.sha256(defining.read_bytes()).hexdigest()
        self._engine: Engine = SentencePieceEngine(model) if defining == model else LibraryEngine(library)
        names = self._engine.names
        self.special = SpecialIds(*(self._engine.id_of(names[name]) for name in NAMES))
        self.vocab_size = self._engine.vocab_size
        self._sep = np.asarray([self.special.sep], self.dtype).tobytes()
        self._encode = self._engine.cached_encoder(self._as_bytes) if word_cache else None

    def encode_documents(self, documents: list[str]) -> list[bytes]:
        """Ids of each document followed by [SEP], as bytes of ``dtype``.

        Raises:
            DataSettingError: The tokenizer makes a special token out of text.
        """
        return [ids + self._sep for ids in self.encode_texts(documents)]

    def encode_texts(self, texts: list[str]) -> list[bytes]:
        """Ids of each text without special tokens, as bytes of ``dtype``; raises as ``encode_documents``."""
        encoded = (self._encode or self._as_bytes)(texts)
        if not self._engine.is_closed_to_text:
            self._refuse_sep_in_text(b"".join(encoded))
        return encoded

    def _as_bytes(self, texts: list[str]) -> list[bytes]:
        return [np.asarray(ids, self.dtype).tobytes() for ids in self._engine.encode_batch(texts)] if texts else []

    def _refuse_sep_in_text(self, ids: bytes) -> None:
        if (np.frombuffer(ids, self.dtype) == self.special.sep).any():
            raise DataSettingError(
                f"{self.folder}: this tokenizer encodes text as [SEP], which must only end documents; "
                "make it a special token that text cannot spell"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return list(map(int, self._engine.encode_batch([text])[0]))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids as ``encode`` gives them, and for each the characters ``[begin, end)`` of ``text`` that it stands for.

        White space belongs to no token; a piece that stands for nothing else is an empty range. Marks that the
        tokenizer drops, such as accents, belong to the letter before them.
        """
        ids, spans = self._engine.encode_with_offsets(text)
        spans = [_without_outer_spaces(text, begin, end) for begin, end in spans]
        following = [begin for begin, _ in spans[1:]] + [len(text)]
        return ids, [
            (b, _over_marks(text, e, limit) if e > b else e) for (b, e), limit in zip(spans, following, strict=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens decode to nothing."""
        return self._engine.decode([int(i) for i in ids])

    def normalize(self, text: str) -> str:
        """The text as pieces are looked up in it."""
        return self._engine.normalize(text)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id, for reading by people."""
        return [self._engine.piece(int(i)) for i in ids]

    @property
    def dtype(self) -> np.dtype:
        """uint16 below 65,536 ids, else int32: what Megatron's readers know."""
        return np.dtype(np.uint16 if self.vocab_size < 65536 else np.int32)


class Engine(Protocol):
    """What a library must do for ``Tokenizer``."""

    vocab_size: int
    names: dict[str, str]
    is_closed_to_text: bool
    """Whether no text can be encoded as a special token, by the way the library works."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Ids of each text, no special tokens."""
        ...

    def cached_encoder(self, encode_batch: EncodeBatch) -> EncodeBatch | None:
        """An encoder that encodes each word once, with the same ids; None where that is not so."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the characters of it that each stands for."""
        ...

    def decode(self, ids: list[int]) -> str: ...  # noqa: D102
    def normalize(self, text: str) -> str: ...  # noqa: D102
    def piece(self, number: int) -> str: ...  # noqa: D102
    def id_of(self, piece: str) -> int: ...  # noqa: D102


class SentencePieceEngine:
    """A sentencepiece model."""

    is_closed_to_text = True  # control symbols are not looked up in text

    def __init__(self, path: Path):
        """Loads a model.

        Raises:
            DamagedDataError: Not a sentencepiece model.
            DataSettingError: It lacks a special token, or text can spell one.
        """
        content = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        self.proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            self._model.LoadFromSerializedProto(content)
            self.proto.ParseFromString(content)
        except Exception as error:  # protobuf's own classes and RuntimeError
            raise DamagedDataError(f"{path}: not a sentencepiece model ({error})") from error
        self.vocab_size = self._model.get_piece_size()
        pieces = {self._model.id_to_piece(number): number for number in range(self.vocab_size)}
        unknown = self._model.unk_id()
        self.names = names_in(pieces | {"[UNK]": unknown}, path) | {"[UNK]": self._model.id_to_piece(unknown)}
        for name in self.names.values():
            if not (self._model.is_control(pieces[name]) or pieces[name] == unknown):
                raise DataSettingError(
                    f"tokenizer.path={path}: {name} is an ordinary piece of it, so text could spell it; "
                    "train a model that has it among its control symbols"
                )

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are merged by rank (BPE); else it is a unigram model."""
        return self.proto.trainer_spec.model_type == self.proto.trainer_spec.BPE

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32."""
        return self._model.encode_as_numpy(texts, num_threads=1)  # tokenize runs one worker process a core

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; the library counts bytes of UTF-8."""
        pieces: Any = self._model.encode(text, return_type="proto").pieces
        character_at = [number for number, character in enumerate(text) for _ in character.encode()] + [len(text)]
        return [p.id for p in pieces], [(character_at[p.begin], character_at[p.end]) for p in pieces]

    @property
    def has_pieces_across_spaces(self) -> bool:
        """Whether a piece holds white space anywhere but at its beginning."""
        return any("▁" in piece.piece[1:] or set(piece.piece) & set(" \t\r\n") for piece in self.proto.pieces)

    def cached_encoder(self, encode_batch: EncodeBatch) -> EncodeBatch | None:
        """For BPE with sentencepiece's own treatment of white space and no piece across a space."""
        rules = self.proto.normalizer_spec
        is_usual = (
            self.is_bpe
            and rules.name in NFKC_RULES
            and rules.add_dummy_prefix
            and rules.remove_extra_whitespaces
            and rules.escape_whitespaces
            and not self.has_pieces_across_spaces
            and not self._model.is_unknown(self._model.piece_to_id("▁"))  # unknown neighbours become one [UNK]
        )
        return WordCache(encode_batch, words).encode if is_usual else None

    def decode(self, ids: list[int]) -> str:
        """Normalised text of ids."""
        return self._model.decode(ids)

    def normalize(self, text: str) -> str:
        """Equals ``decode(encode(text))`` when no piece is unknown."""
        return self._model.normalize(text).replace("▁", " ").strip()

    def piece(self, number: int) -> str:
        """The piece of an id."""
        return self._model.id_to_piece(number)

    def id_of(self, piece: str) -> int:
        """The id of a piece."""
        return self._model.piece_to_id(piece)


class LibraryEngine:
    """A tokenizer.json of the tokenizers library, such as BERT's WordPiece."""

    is_closed_to_text = False

    def __init__(self, path: Path):
        """Loads a tokenizer.json; raises as ``SentencePieceEngine``."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenize runs one worker process a core
        self._library = load_library(path)
        self._library.encode_special_tokens = True  # text that spells [SEP] is ordinary text
        vocabulary = self._library.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.names = names_in(vocabulary, path)
        self._refuse_special_tokens_in_text(path)

    def _refuse_special_tokens_in_text(self, path: Path) -> None:
        for name in set(self.names.values()) - {self.names["[UNK]"]}:
            try:
                ids = [i for text in (name, f"a {name} a", f"a{name}a") for i in self.encode_batch([text])[0]]
            except Exception as error:  # the library raises nothing more specific
                raise DataSettingError(f"tokenizer.path={path}: it cannot encode text ({error}); repair it") from error
            if self.id_of(name) in ids:
                raise DataSettingError(
                    f"tokenizer.path={path}: text that spells {name} is encoded as that token; "
                    "give a tokenizer that divides it"
                )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets."""
        encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def cached_encoder(self, encode_batch: EncodeBatch) -> EncodeBatch | None:
        """For WordPiece under BERT's rules, without words added to the vocabulary."""
        rules = json.loads(self._library.to_str())
        is_wordpiece = rules["model"].get("type") == "WordPiece" and all(t["special"] for t in rules["added_tokens"])
        normalizer, pre_tokenizer = rules["normalizer"] or {}, rules["pre_tokenizer"] or {}
        if not is_wordpiece:
            return None
        for lowercase in (False, True):
            theirs = (normalizer.get("type"), normalizer.get("lowercase"), pre_tokenizer.get("type"))
            is_ours = (normalizer, pre_tokenizer) == tuple(json.loads(r.__getstate__()) for r in bert_rules(lowercase))
            if is_ours or theirs == ("BertNormalizer", lowercase, "BertPreTokenizer"):
                return WordCache(encode_batch, bert_words).encode
        return None

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._library.decode(ids)

    def normalize(self, text: str) -> str:
        """The text after the normalizer."""
        return self._library.normalizer.normalize_str(text) if self._library.normalizer else text

    def piece(self, number: int) -> str:
        """The piece of an id."""
        return self._library.id_to_token(number) or ""

    def id_of(self, piece: str) -> int:
        """The id of a piece."""
        number = self._library.token_to_id(piece)
        assert number is not None
        return number


def _over_marks(text: str, end: int, limit: int) -> int:
    """The end of the marks and joiners that follow ``end``, at most ``limit``."""
    while end < limit and unicodedata.category(text[end]) in _MARKS:
        end += 1
    return end


def _without_outer_spaces(text: str, begin: int, end: int) -> tuple[int, int]:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end


def load_library(path: Path) -> Library:
    """A tokenizer.json, without the truncation and padding that it may ask for.

    Raises:
        DamagedDataError: It cannot be read as one.
    """
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise DamagedDataError(f"{path}: not a tokenizer.json ({error})") from error
    library.no_truncation()
    library.no_padding()
    return library


def bert_rules(lowercase: bool) -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """BERT's own rules (``tokenization.py`` of google-research/electra) for what a word is."""
    cleaned = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(_DROPPED), ""), cleaned]
    if lowercase:  # in Google's order
        steps += [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()]
        steps += [normalizers.NFD(), normalizers.Replace(Regex(_ACCENT), "")]
    alone = pre_tokenizers.Split(Regex(_BERT_PUNCTUATION), "isolated")
    return normalizers.Sequence(steps), pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), alone])


def names_in(vocabulary: dict[str, int], path: object) -> dict[str, str]:
    """What each special token is called in a vocabulary.

    Raises:
        DataSettingError: One is missing.
    """
    found = {name: next((n for n in (name, *_OTHER_NAMES[name]) if n in vocabulary), "") for name in NAMES}
    missing = [name for name, other in found.items() if not other]
    if missing:
        raise DataSettingError(
            f"tokenizer.path={path}: it has no {', '.join(missing)}; ELECTRA needs {' '.join(NAMES)}: "
            "add them to it, or let tokenize train a tokenizer"
        )
    return found
