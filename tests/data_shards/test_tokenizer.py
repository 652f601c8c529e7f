"""The tokenizer: fixed special ids, nothing lost in any language, clear refusals."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_shards.errors import DamagedDataError, DataSettingError
from data_shards.tokenizer import CLS, MASK, PAD, SEP, SPECIAL_PIECES, UNK, Tokenizer, train


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


def test_special_pieces_have_the_ids_zero_to_four(tokenizer):
    assert (PAD, UNK, CLS, SEP, MASK) == (0, 1, 2, 3, 4)
    assert tokenizer.pieces(range(5)) == list(SPECIAL_PIECES)


def test_the_vocabulary_has_the_size_that_was_asked_for(tokenizer, settings):
    assert tokenizer.vocab_size == settings.vocab_size


@pytest.mark.parametrize("language", ["English", "Korean", "Japanese", "Russian"])
def test_decoding_gives_the_normalised_text_back(tokenizer, sentences, language):
    text = f"  {sentences[language]}\n\t{sentences[language]} "
    ids = tokenizer.encode(text)
    assert UNK not in ids
    assert tokenizer.decode(ids) == tokenizer.normalize(text)


def test_normalisation_is_nfkc_and_joins_spaces(tokenizer):
    assert tokenizer.normalize(" ﬁne  ﾊﾟﾝ\u3000Ａ１\n") == "fine パン A1"


def test_case_folding_is_a_setting(settings, documents):
    for normalization, expected in (("nfkc", "The Вечером"), ("nfkc_cf", "the вечером")):
        model = train(replace(settings, vocab_size=300, normalization=normalization), documents)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert processor.normalize("The Вечером").replace("▁", " ").strip() == expected


def test_text_that_spells_a_special_piece_never_becomes_one(tokenizer):
    ids = tokenizer.encode("a [SEP] b [CLS] c [MASK] d [PAD] e[SEP][MASK]")
    assert not {PAD, CLS, SEP, MASK} & set(ids)


def test_encoded_documents_end_with_sep_and_hold_no_other(tokenizer, sentences):
    texts = list(sentences.values())
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == [*tokenizer.encode(text), SEP]
        assert np.flatnonzero(ids == SEP).tolist() == [len(ids) - 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_535, np.uint16), (65_536, np.int32)])
def test_ids_are_uint16_below_65536_pieces(tokenizer_path, vocab_size, dtype):
    tokenizer = Tokenizer(tokenizer_path)
    tokenizer.vocab_size = vocab_size
    assert tokenizer.dtype == dtype


@pytest.mark.parametrize("kind", ["sentencepiece_unigram", "sentencepiece_bpe"])
def test_a_vocabulary_too_large_names_the_largest_which_then_works(settings, documents, tmp_path, kind):
    paragraphs = [line for document in documents[:40] for line in document.splitlines()]
    too_large = replace(settings, kind=kind, vocab_size=100_000)
    with pytest.raises(DataSettingError, match=r"tokenizer\.vocab_size=100000: .* at most \d+") as error:
        train(too_large, paragraphs)
    assert error.value.exit_code == 78
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(replace(too_large, vocab_size=largest), paragraphs))
    assert Tokenizer(path).vocab_size == largest
    with pytest.raises(DataSettingError, match=f"at most {largest}"):
        train(replace(too_large, vocab_size=largest + 1), paragraphs)


def test_a_vocabulary_too_small_for_the_characters_says_so(settings, sentences):
    with pytest.raises(DataSettingError, match=r"tokenizer\.vocab_size=20 has no room"):
        train(replace(settings, vocab_size=20), sentences.values())


def test_training_without_text_is_a_wrong_setting(settings):
    with pytest.raises(DataSettingError, match="could not train"):
        train(settings, [])


@pytest.mark.parametrize("kind", ["sentencepiece_unigram", "sentencepiece_bpe"])
def test_training_twice_gives_the_same_bytes(settings, documents, kind):
    paragraphs = [line for document in documents for line in document.splitlines()]
    first, second = (train(replace(settings, kind=kind), paragraphs) for _ in range(2))
    assert first == second


def test_a_model_without_our_special_pieces_is_refused(documents, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, vocab_size=300, minloglevel=2
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataSettingError, match=r"foreign\.model: ids 0 to 4 must be .* not <unk> <s> </s>"):
        Tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256)) * 8])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"tokenizer\.model: not a sentencepiece model"):
        Tokenizer(path)


def test_a_missing_model_is_a_wrong_setting(tmp_path):
    with pytest.raises(DataSettingError, match=r"no file .*tokenizer\.model"):
        Tokenizer(tmp_path / "tokenizer.model")
